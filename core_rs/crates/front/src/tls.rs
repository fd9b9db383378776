//! The TLS side: certificates that are replaced while connections run, tickets, and clients that show who they are.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use tokio::sync::watch;

/// No file of certificates comes near this.
const FILE_BYTES: u64 = 16 << 20;

/// Files of one certificate, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The certificate, followed by its intermediates.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Files of the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// In the order of preference; a client gets the first whose signatures it understands.
    pub pairs: Vec<Pair>,
    /// Authorities of clients that may show a certificate.
    pub client_ca: Option<PathBuf>,
    /// What those have revoked; the file need not exist.
    pub client_crl: Option<PathBuf>,
}

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", .file.display())]
pub struct FileError {
    /// Which.
    pub file: PathBuf,
    /// Why.
    pub reason: String,
}

impl FileError {
    fn new(file: &Path, reason: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            reason: reason.into(),
        }
    }
}

/// What new connections are made with.
pub struct Tls {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<ServerConfig>,
    tickets: ArcSwap<Tickets>,
    /// Of clients' certificates; those that are connected look at it again when it changes.
    verifier: watch::Sender<Verifier>,
}

pub(crate) type Verifier = Option<Arc<dyn ClientCertVerifier>>;

/// The certificate that a connection's client has shown, its own first.
pub(crate) struct Shown {
    chain: Vec<CertificateDer<'static>>,
    verifier: watch::Receiver<Verifier>,
}

impl Shown {
    /// `None`: the client has shown nothing.
    pub(crate) fn new(
        chain: Option<&[CertificateDer<'_>]>,
        verifier: watch::Receiver<Verifier>,
    ) -> Option<Self> {
        let owned = |certificate: &CertificateDer<'_>| certificate.clone().into_owned();
        let chain = chain?.iter().map(owned).collect();
        Some(Self { chain, verifier })
    }

    /// Returns when the certificate is not good any more.
    pub(crate) async fn refused(&mut self) {
        while self.verifier.changed().await.is_ok() {
            if !self.is_good() {
                return;
            }
        }
        // Nobody will say so any more.
        std::future::pending::<()>().await;
    }

    fn is_good(&self) -> bool {
        let verifier = self.verifier.borrow().clone();
        let Some((own, others)) = self.chain.split_first() else {
            return true;
        };
        verifier.is_none_or(|verifier| {
            verifier
                .verify_client_cert(own, others, UnixTime::now())
                .is_ok()
        })
    }
}

/// Tickets belong to the authorities that vouched for the clients who hold them.
struct Tickets {
    trust: Vec<u8>,
    ticketer: Arc<dyn ProducesTickets>,
}

/// The first pair whose signatures the client understands.
#[derive(Debug)]
struct Choice(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Choice {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let found = self
            .0
            .iter()
            .find(|pair| pair.key.choose_scheme(schemes).is_some());
        found.cloned()
    }
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, FileError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let trust = trust(&files)?;
        let tickets = Arc::new(tickets(trust)?);
        let verifier = verifier(&files, &provider)?;
        let config = config(&files, &provider, &tickets, verifier.clone())?;
        Ok(Self {
            verifier: watch::Sender::new(verifier),
            files,
            provider,
            current: ArcSwap::from_pointee(config),
            tickets: ArcSwap::new(tickets),
        })
    }

    /// Reads the files again, for connections from now on; on an error the old ones stay.
    pub fn reload(&self) -> Result<(), FileError> {
        let trust = trust(&self.files)?;
        let mut held = self.tickets.load_full();
        let other = held.trust != trust;
        if other {
            // A resumed connection shows no certificate again: who may not come back, must not have a ticket.
            held = Arc::new(tickets(trust)?);
        }
        let verifier = verifier(&self.files, &self.provider)?;
        let config = config(&self.files, &self.provider, &held, verifier.clone())?;
        self.tickets.store(held);
        self.current.store(Arc::new(config));
        if other {
            self.verifier.send_replace(verifier);
        }
        Ok(())
    }

    /// Tells what changes from now on: asked for before a handshake looks at a certificate.
    pub(crate) fn watch(&self) -> watch::Receiver<Verifier> {
        self.verifier.subscribe()
    }

    /// For one connection.
    pub fn current(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }
}

fn tickets(trust: Vec<u8>) -> Result<Tickets, FileError> {
    // Its keys change every six hours, and those before are taken for as long.
    let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(|error| {
        FileError::new(
            Path::new("/dev/urandom"),
            format!("gives no keys for tickets: {error}"),
        )
    })?;
    Ok(Tickets { trust, ticketer })
}

/// All that decides which client certificates are good.
fn trust(files: &TlsFiles) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    if let Some(path) = &files.client_ca {
        bytes = read(path)?;
        if let Some(path) = files.client_crl.as_deref().filter(|path| path.exists()) {
            bytes.extend(read(path)?);
        }
    }
    Ok(bytes)
}

fn config(
    files: &TlsFiles,
    provider: &Arc<CryptoProvider>,
    tickets: &Tickets,
    verifier: Verifier,
) -> Result<ServerConfig, FileError> {
    let pairs = files
        .pairs
        .iter()
        .map(|pair| certified(pair, provider).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let first = files.pairs.first().map_or(Path::new(""), |pair| &pair.cert);
    let wrong = |error: rustls::Error| FileError::new(first, format!("cannot be used: {error}"));
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrong)?;
    let builder = match verifier {
        None => builder.with_no_client_auth(),
        Some(verifier) => builder.with_client_cert_verifier(verifier),
    };
    let mut config = builder.with_cert_resolver(Arc::new(Choice(pairs)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = Arc::clone(&tickets.ticketer);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 1;
    Ok(config)
}

fn certified(pair: &Pair, provider: &CryptoProvider) -> Result<CertifiedKey, FileError> {
    let chain = certificates(&pair.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&pair.key)?).map_err(|error| {
        FileError::new(
            &pair.key,
            format!("is no unencrypted PEM private key: {error}"),
        )
    })?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| {
            FileError::new(&pair.key, format!("is not a usable private key: {error}"))
        })?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        FileError::new(
            &pair.key,
            format!(
                "does not belong to the certificate in {}",
                pair.cert.display()
            ),
        )
    })?;
    Ok(certified)
}

fn verifier(files: &TlsFiles, provider: &Arc<CryptoProvider>) -> Result<Verifier, FileError> {
    let Some(path) = &files.client_ca else {
        return Ok(None);
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| FileError::new(path, format!("cannot be used as a CA: {error}")))?;
    }
    let mut builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .allow_unauthenticated();
    if let Some(list) = files.client_crl.as_deref().filter(|list| list.exists()) {
        let lists = CertificateRevocationListDer::pem_slice_iter(&read(list)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| FileError::new(list, format!("is no PEM revocation list: {error}")))?;
        builder = builder.with_crls(lists).allow_unknown_revocation_status();
    }
    let built = builder
        .build()
        .map_err(|error| FileError::new(path, format!("cannot be used for clients: {error}")))?;
    Ok(Some(built))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| FileError::new(path, format!("is not a PEM certificate: {error}")))?;
    if found.is_empty() {
        return Err(FileError::new(path, "holds no PEM certificate"));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| FileError::new(path, format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(FileError::new(path, "is too large for certificates"));
    }
    Ok(bytes)
}
