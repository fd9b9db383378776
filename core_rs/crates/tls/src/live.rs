//! A TLS configuration that is replaced while connections run.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::error::{HandshakeError, TlsError};
use crate::files::{Files, Stamp};
use crate::identity::{Peer, is_service_name};
use crate::material::Material;
use crate::verify::{Purpose, Verifier};

/// Builds a configuration from a verified identity.
pub(crate) type Build<C> = fn(&Material) -> Result<C, rustls::Error>;

pub(crate) struct Loaded<C> {
    pub(crate) config: Arc<C>,
    pub(crate) own: Peer,
    pub(crate) not_after: i64,
    verifier: Arc<Verifier>,
}

struct Attempt {
    /// The files as they were just before the latest attempt to load them.
    stamp: Stamp,
    refused: bool,
    had_crl: bool,
}

pub(crate) struct Live<C> {
    files: Files,
    purpose: Purpose,
    allow: Arc<[String]>,
    build: Build<C>,
    current: ArcSwap<Loaded<C>>,
    attempt: Mutex<Attempt>,
    swaps: watch::Sender<u64>,
}

impl<C: Send + Sync + 'static> Live<C> {
    pub(crate) fn load(
        files: Files,
        purpose: Purpose,
        allow: Vec<String>,
        build: Build<C>,
    ) -> Result<Arc<Self>, TlsError> {
        if let Some(wrong) = allow.iter().find(|name| !is_service_name(name)) {
            let reason = format!(
                "expected peer `{wrong}` is not a service name (lower-case letters, digits, `-`)"
            );
            return Err(TlsError::new(&files.cert, reason));
        }
        let allow: Arc<[String]> = allow.into();
        let stamp = files.stamp();
        let mut material = Material::load(&files, purpose, &allow)?;
        if let Some(revoked) = material.revoked.take() {
            return Err(revoked);
        }
        let loaded = finish(&files, &material, build)?;
        Ok(Arc::new(Self {
            attempt: Mutex::new(Attempt {
                stamp,
                refused: false,
                had_crl: material.has_crl,
            }),
            current: ArcSwap::from_pointee(loaded),
            swaps: watch::Sender::new(0),
            files,
            purpose,
            allow,
            build,
        }))
    }

    pub(crate) fn current(&self) -> Arc<Loaded<C>> {
        self.current.load_full()
    }

    pub(crate) fn swaps(&self) -> watch::Receiver<u64> {
        self.swaps.subscribe()
    }

    pub(crate) fn recheck(&self, peer: &Peer) -> Result<(), HandshakeError> {
        let Some((leaf, intermediates)) = peer.chain.split_first() else {
            return Err(HandshakeError::from_tls(
                &rustls::Error::NoCertificatesPresented,
            ));
        };
        self.current
            .load()
            .verifier
            .check(leaf, intermediates, UnixTime::now())
            .map_err(|e| HandshakeError::from_tls(&e))
    }

    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        // A panic while the lock was held cannot have left a half-written Attempt behind.
        let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        // Before reading: a change that comes during the reading is then seen as one.
        attempt.stamp = self.files.stamp();
        let outcome = self.replace(&mut attempt);
        attempt.refused = outcome.is_err();
        outcome
    }

    fn replace(&self, attempt: &mut Attempt) -> Result<(), TlsError> {
        let material = Material::load(&self.files, self.purpose, &self.allow)?;
        if let (true, false, Some(path)) = (attempt.had_crl, material.has_crl, &self.files.crl) {
            let reason = "was in use and is gone: what it revoked would be trusted again; put it back, or restart \
                          to run without one";
            return Err(TlsError::new(path, reason));
        }
        let loaded = finish(&self.files, &material, self.build)?;
        if let Some(revoked) = &material.revoked {
            // Peers refuse us from now on, each by itself; whom else the list names, we refuse.
            tracing::error!(file = %revoked.file.display(), reason = %revoked.reason, "our own certificate is of no use any more");
        }
        self.current.store(Arc::new(loaded));
        attempt.had_crl = material.has_crl;
        self.swaps.send_modify(|n| *n += 1);
        Ok(())
    }

    pub(crate) fn watch(self: &Arc<Self>, interval: Duration) -> JoinHandle<()> {
        tokio::spawn(watch_files(Arc::downgrade(self), interval))
    }

    /// Whether the files differ from the latest attempt, or that attempt was refused.
    fn pending(&self, now: &Stamp) -> (bool, bool) {
        let attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        (attempt.stamp != *now, attempt.refused)
    }
}

fn finish<C>(files: &Files, material: &Material, build: Build<C>) -> Result<Loaded<C>, TlsError> {
    let config =
        build(material).map_err(|e| TlsError::new(&files.cert, format!("cannot be used: {e}")))?;
    Ok(Loaded {
        config: Arc::new(config),
        own: material.own.clone(),
        not_after: material.not_after,
        verifier: Arc::clone(&material.verifier),
    })
}

/// Ends when the owner is dropped.
async fn watch_files<C: Send + Sync + 'static>(live: Weak<Live<C>>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut settling: Option<Stamp> = None;
    loop {
        ticks.tick().await;
        let Some(live) = live.upgrade() else { return };
        let now = live.files.stamp();
        let (changed, refused) = live.pending(&now);
        if !changed && !refused {
            settling = None;
            continue;
        }
        // Key and certificate are two files: wait until a whole interval passed without a change.
        if changed && settling.as_ref() != Some(&now) {
            settling = Some(now);
            continue;
        }
        settling = None;
        // An unchanged set that was refused is tried again, because a date may have made it good;
        // it is reported once.
        let _ = tokio::task::spawn_blocking(move || reload_and_log(&live, changed)).await;
    }
}

fn reload_and_log<C: Send + Sync + 'static>(live: &Live<C>, changed: bool) {
    match live.reload() {
        Ok(()) => {
            let now = live.current();
            tracing::info!(
                service = %now.own.service,
                serial = %now.own.serial,
                file = %live.files.cert.display(),
                "certificates replaced"
            );
        }
        Err(e) if changed => {
            tracing::error!(file = %e.file.display(), reason = %e.reason, "new certificates refused, the old ones stay");
        }
        Err(_) => {}
    }
}
