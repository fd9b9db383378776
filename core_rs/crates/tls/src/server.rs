//! The accepting side.

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::error::{HandshakeError, TlsError};
use crate::files::Files;
use crate::identity::Peer;
use crate::live::Live;
use crate::material::Material;
use crate::verify::{Purpose, Verifier};

/// A client that connects and then says nothing must not hold a task for longer.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The server side of an identity: who we are, and which services may call.
pub struct ServerTls {
    live: Arc<Live<ServerConfig>>,
}

impl ServerTls {
    /// Loads and verifies `files` (a certificate for serverAuth). Clients must be one of the services
    /// in `allow`; an empty list refuses everybody.
    pub fn load(files: Files, allow: Vec<String>) -> Result<Self, TlsError> {
        Ok(Self {
            live: Live::load(files, Purpose::Server, allow, config)?,
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

    /// Whether `peer`, accepted earlier, would be accepted now. A server that must end the
    /// connections of a revoked peer asks this after each swap.
    pub fn recheck(&self, peer: &Peer) -> Result<(), HandshakeError> {
        self.live.recheck(peer)
    }

    /// Completes the handshake within [`HANDSHAKE_TIMEOUT`] and says who called.
    ///
    /// Call it on a task of its own: a slow client then holds up nobody.
    pub async fn accept(
        &self,
        tcp: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Peer), HandshakeError> {
        self.accept_within(tcp, HANDSHAKE_TIMEOUT).await
    }

    /// [`ServerTls::accept`] with another limit.
    pub async fn accept_within(
        &self,
        tcp: TcpStream,
        limit: Duration,
    ) -> Result<(TlsStream<TcpStream>, Peer), HandshakeError> {
        tcp.set_nodelay(true)
            .map_err(|e| HandshakeError::from_io(&e))?;
        let acceptor = TlsAcceptor::from(Arc::clone(&self.live.current().config));
        let stream = tokio::time::timeout(limit, acceptor.accept(tcp))
            .await
            .map_err(|_| HandshakeError::Timeout { after: limit })?
            .map_err(|e| HandshakeError::from_io(&e))?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = Peer::read(chain).map_err(|reason| HandshakeError::Refused { reason })?;
        Ok((stream, peer))
    }
}

fn config(material: &Material) -> Result<ServerConfig, rustls::Error> {
    let verifier: Arc<Verifier> = Arc::clone(&material.verifier);
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&material.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            &material.certified,
        ))));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}
