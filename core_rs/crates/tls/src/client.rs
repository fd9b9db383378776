//! The calling side.

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::{HandshakeError, TlsError};
use crate::files::Files;
use crate::identity::{Peer, TRUST_DOMAIN};
use crate::live::Live;
use crate::material::Material;
use crate::verify::{Purpose, Verifier};

/// The client side of an identity: who we are, and which service we call.
pub struct ClientTls {
    live: Arc<Live<ClientConfig>>,
    name: ServerName<'static>,
}

impl ClientTls {
    /// Loads and verifies `files` (a certificate for clientAuth). Servers must be the service `expect`.
    pub fn load(files: Files, expect: String) -> Result<Self, TlsError> {
        // The service's own name, whatever the address: valid for SNI where a host name may not be.
        let name = ServerName::try_from(format!("{expect}.{TRUST_DOMAIN}")).map_err(|_| {
            TlsError::new(
                &files.cert,
                format!("expected peer `{expect}` is not a service name"),
            )
        })?;
        Ok(Self {
            live: Live::load(files, Purpose::Client, vec![expect], config)?,
            name,
        })
    }

    /// Reads the files again, verifies all of them and swaps them in for new connections. Running
    /// connections are not touched. On error the old ones stay.
    ///
    /// Blocks for a few milliseconds of file reading and signature checks.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.live.reload()
    }

    /// Looks at the files every `interval` and reloads when they changed and then stayed the same
    /// for one interval. Logs what it does; a refused set once. Ends when `self` is dropped.
    ///
    /// Must be called inside a tokio runtime.
    pub fn watch(&self, interval: Duration) -> JoinHandle<()> {
        self.live.watch(interval)
    }

    /// Number of swaps so far; changes after each successful reload.
    pub fn swaps(&self) -> watch::Receiver<u64> {
        self.live.swaps()
    }

    /// Who we are.
    pub fn own(&self) -> Peer {
        self.live.current().own.clone()
    }

    /// End of our certificate's validity, seconds since 1970.
    pub fn not_after(&self) -> i64 {
        self.live.current().not_after
    }

    /// Connects to `host:port` and completes the handshake, all within `limit`.
    ///
    /// In TLS 1.3 a client is done before the server has judged its certificate: a refusal by the
    /// server arrives as an error of the first read.
    pub async fn connect(
        &self,
        host: &str,
        port: u16,
        limit: Duration,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let within = async {
            let tcp = TcpStream::connect((host, port)).await.map_err(|source| {
                HandshakeError::Connect {
                    address: format!("{host}:{port}"),
                    source,
                }
            })?;
            self.handshake(tcp).await
        };
        tokio::time::timeout(limit, within)
            .await
            .map_err(|_| HandshakeError::Timeout { after: limit })?
    }

    /// Whether `peer`, connected to earlier, would be accepted now: see [`crate::ServerTls::recheck`].
    pub fn recheck(&self, peer: &Peer) -> Result<(), HandshakeError> {
        self.live.recheck(peer)
    }

    /// Who answered on a connection of ours.
    pub fn peer(stream: &TlsStream<TcpStream>) -> Result<Peer, HandshakeError> {
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        Peer::read(chain).map_err(|reason| HandshakeError::Refused { reason })
    }

    /// Completes the handshake over a connection that exists.
    pub async fn handshake(&self, tcp: TcpStream) -> Result<TlsStream<TcpStream>, HandshakeError> {
        tcp.set_nodelay(true)
            .map_err(|e| HandshakeError::from_io(&e))?;
        TlsConnector::from(Arc::clone(&self.live.current().config))
            .connect(self.name.clone(), tcp)
            .await
            .map_err(|e| HandshakeError::from_io(&e))
    }
}

fn config(material: &Material) -> Result<ClientConfig, rustls::Error> {
    let verifier: Arc<Verifier> = Arc::clone(&material.verifier);
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&material.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            &material.certified,
        ))));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}
