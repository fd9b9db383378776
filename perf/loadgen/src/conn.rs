//! Connections to the server under test, and one exchange on one of them.

use crate::args::{Args, Url};
use crate::http::{Head, parse_head};
use bytes::{Buf, BytesMut};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Read size: larger than a TLS record.
const READ: usize = 32 * 1024;

/// What every exchange of a run has in common.
pub(crate) struct Target {
    url: Url,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    request: Vec<u8>,
}

impl Target {
    /// Reads the CA and writes the request once. `resume`: keep TLS session tickets.
    pub(crate) fn new(args: &Args, resume: bool) -> Result<Self, String> {
        let tls = if args.url.tls {
            Some(connector(args, resume)?)
        } else {
            None
        };
        let method = if args.body.is_some() { "POST" } else { "GET" };
        let host = if args.url.host.contains(':') {
            format!("[{}]", args.url.host)
        } else {
            args.url.host.clone()
        };
        let mut request = format!(
            "{method} {} HTTP/1.1\r\nhost: {host}:{}\r\n",
            args.url.path,
            args.url.addr.port()
        );
        for header in &args.headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        if let Some(body) = &args.body {
            request.push_str("content-type: application/json\r\ncontent-length: ");
            request.push_str(&body.len().to_string());
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        let mut request = request.into_bytes();
        request.extend_from_slice(args.body.as_deref().unwrap_or_default());
        Ok(Self {
            url: args.url.clone(),
            tls,
            request,
        })
    }

    /// Opens the TCP connection.
    pub(crate) async fn tcp(&self) -> Result<TcpStream, String> {
        let tcp = TcpStream::connect(self.url.addr)
            .await
            .map_err(|error| format!("connect: {error}"))?;
        tcp.set_nodelay(true)
            .map_err(|error| format!("connect: {error}"))?;
        Ok(tcp)
    }

    /// Runs the TLS handshake, or none for plain HTTP.
    pub(crate) async fn handshake(&self, tcp: TcpStream) -> Result<Connection, String> {
        let stream = match &self.tls {
            None => Stream::Plain(tcp),
            Some((connector, name)) => {
                let tls = connector
                    .connect(name.clone(), tcp)
                    .await
                    .map_err(|error| format!("tls: {error}"))?;
                Stream::Tls(Box::new(tls))
            }
        };
        Ok(Connection {
            stream,
            buffer: BytesMut::with_capacity(READ),
        })
    }

    /// TCP and TLS.
    pub(crate) async fn connect(&self) -> Result<Connection, String> {
        self.handshake(self.tcp().await?).await
    }
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One connection and what was read from it but not used.
pub(crate) struct Connection {
    stream: Stream,
    buffer: BytesMut,
}

impl Connection {
    /// Whether TLS resumed an earlier session.
    pub(crate) fn resumed(&self) -> bool {
        match &self.stream {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => {
                tls.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
            }
        }
    }

    /// Sends the request; returns the head of the answer.
    pub(crate) async fn send(&mut self, target: &Target) -> Result<Head, String> {
        let sent = match &mut self.stream {
            Stream::Plain(tcp) => tcp.write_all(&target.request).await,
            Stream::Tls(tls) => match tls.write_all(&target.request).await {
                Ok(()) => tls.flush().await,
                Err(error) => Err(error),
            },
        };
        sent.map_err(|error| format!("write: {}", error.kind()))?;
        loop {
            if let Some(head) = parse_head(&self.buffer)? {
                self.buffer.advance(head.len);
                return Ok(head);
            }
            if self.fill().await? == 0 {
                return Err("closed before an answer".to_owned());
            }
        }
    }

    /// Reads the body of an answer to its end; `sink` sees its bytes as they arrive.
    pub(crate) async fn body(
        &mut self,
        head: &mut Head,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), String> {
        let mut done = head.body == crate::http::Body::Length(0);
        while !done {
            if self.buffer.is_empty() && self.fill().await? == 0 {
                let until_close = head.body == crate::http::Body::UntilClose;
                return if until_close {
                    Ok(())
                } else {
                    Err("closed inside a body".to_owned())
                };
            }
            let (used, complete) = head.body.feed(&self.buffer, &mut sink)?;
            self.buffer.advance(used);
            done = complete;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<usize, String> {
        self.buffer.reserve(READ);
        let read = match &mut self.stream {
            Stream::Plain(tcp) => tcp.read_buf(&mut self.buffer).await,
            Stream::Tls(tls) => tls.read_buf(&mut self.buffer).await,
        };
        match read {
            // A peer that ends without close_notify: the framing of the body decides.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(0),
            other => other.map_err(|error| format!("read: {}", error.kind())),
        }
    }
}

fn connector(args: &Args, resume: bool) -> Result<(TlsConnector, ServerName<'static>), String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| format!("tls: {error}"))?;
    let mut config = match &args.ca {
        Some(path) if !args.insecure => builder
            .with_root_certificates(roots(path)?)
            .with_no_client_auth(),
        _ => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(algorithms)))
            .with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    if !resume {
        config.resumption = Resumption::disabled();
    }
    let name =
        ServerName::try_from(args.url.host.clone()).map_err(|error| format!("--url: {error}"))?;
    Ok((TlsConnector::from(Arc::new(config)), name))
}

fn roots(path: &Path) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path)
        .map_err(|error| format!("--ca {}: {error}", path.display()))?;
    for certificate in certificates {
        let certificate =
            certificate.map_err(|error| format!("--ca {}: {error}", path.display()))?;
        store
            .add(certificate)
            .map_err(|error| format!("--ca {}: {error}", path.display()))?;
    }
    if store.is_empty() {
        Err(format!("--ca {}: no certificate in it", path.display()))
    } else {
        Ok(store)
    }
}

/// Accepts any certificate; handshake signatures are still checked. Only loopback servers are ever reached.
#[derive(Debug)]
struct AnyServer(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(
            "TLS 1.2 is never offered".to_owned(),
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
