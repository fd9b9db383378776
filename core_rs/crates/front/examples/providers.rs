//! What TLS 1.3 costs a server with each of the crypto providers of rustls: `cargo run --release -p helix-front --example
//! providers`. ECDSA P-256 certificates; client and server in one thread, over memory; only what the server computes is counted.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measurement: its table is its answer

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, NamedGroup, RootCertStore, ServerConfig, ServerConnection,
};

const HANDSHAKES: usize = 400;
const ROUNDS: usize = 7;
const RECORDS: usize = 2_000;
/// The largest payload of a record (bytes).
const RECORD: usize = 16_384;
/// As large as an event of a stream (bytes).
const EVENT: usize = 200;

struct Pair {
    client: ClientConnection,
    server: ServerConnection,
    /// What the server has spent.
    spent: Duration,
}

impl Pair {
    /// Moves all bytes both ways, until nobody has any left.
    fn settle(&mut self) {
        let mut buffer = Vec::new();
        loop {
            buffer.clear();
            while self.client.wants_write() {
                self.client.write_tls(&mut buffer).unwrap();
            }
            let sent = buffer.len();
            let began = Instant::now();
            let mut rest = &buffer[..];
            while !rest.is_empty() {
                self.server.read_tls(&mut rest).unwrap();
                self.server.process_new_packets().unwrap();
            }
            let mut back = Vec::new();
            while self.server.wants_write() {
                self.server.write_tls(&mut back).unwrap();
            }
            self.spent += began.elapsed();
            let mut rest = &back[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                self.client.process_new_packets().unwrap();
            }
            if sent == 0 && back.is_empty() {
                return;
            }
        }
    }
}

fn configs(
    provider: &CryptoProvider,
    group: &'static dyn SupportedKxGroup,
) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let provider = Arc::new(CryptoProvider {
        kx_groups: vec![group],
        ..provider.clone()
    });
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let tls13 = &[&rustls::version::TLS13];
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(tls13)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.resumption = rustls::client::Resumption::disabled();
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    (Arc::new(client), Arc::new(server))
}

fn connect(configs: &(Arc<ClientConfig>, Arc<ServerConfig>)) -> Pair {
    let name = ServerName::try_from("localhost").unwrap();
    let mut pair = Pair {
        client: ClientConnection::new(Arc::clone(&configs.0), name).unwrap(),
        server: ServerConnection::new(Arc::clone(&configs.1)).unwrap(),
        spent: Duration::ZERO,
    };
    pair.settle();
    pair
}

/// Microseconds of a full handshake.
fn handshake_us(configs: &(Arc<ClientConfig>, Arc<ServerConfig>)) -> f64 {
    let spent: Duration = (0..HANDSHAKES).map(|_| connect(configs).spent).sum();
    spent.as_secs_f64() * 1e6 / f64::from(u32::try_from(HANDSHAKES).unwrap())
}

/// Microseconds to encrypt one record of `size` bytes.
fn record_us(configs: &(Arc<ClientConfig>, Arc<ServerConfig>), size: usize) -> f64 {
    let mut pair = connect(configs);
    let payload = vec![b'x'; size];
    let mut sink = Vec::with_capacity(2 * RECORD);
    let mut plain = vec![0; 2 * RECORD];
    let mut spent = Duration::ZERO;
    for _ in 0..RECORDS {
        sink.clear();
        let began = Instant::now();
        pair.server.writer().write_all(&payload).unwrap();
        while pair.server.wants_write() {
            pair.server.write_tls(&mut sink).unwrap();
        }
        spent += began.elapsed();
        let mut rest = &sink[..];
        while !rest.is_empty() {
            pair.client.read_tls(&mut rest).unwrap();
            pair.client.process_new_packets().unwrap();
        }
        let mut left = size;
        while left > 0 {
            left -= pair.client.reader().read(&mut plain).unwrap();
        }
    }
    spent.as_secs_f64() * 1e6 / f64::from(u32::try_from(RECORDS).unwrap())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let providers = [
        ("ring", rustls::crypto::ring::default_provider()),
        ("aws-lc-rs", rustls::crypto::aws_lc_rs::default_provider()),
    ];
    let mut cases = Vec::new();
    for (name, provider) in &providers {
        for group in [NamedGroup::X25519, NamedGroup::X25519MLKEM768] {
            let Some(kx) = provider.kx_groups.iter().find(|kx| kx.name() == group) else {
                continue;
            };
            cases.push((name, group, configs(provider, *kx)));
        }
    }
    // In turn, for no machine is twice the same.
    let rounds: Vec<Vec<[f64; 3]>> = (0..ROUNDS)
        .map(|_| {
            let measured = cases.iter().map(|(.., configs)| {
                [
                    handshake_us(configs),
                    record_us(configs, RECORD),
                    record_us(configs, EVENT),
                ]
            });
            measured.collect()
        })
        .collect();
    println!(
        "| provider | key exchange | handshake (us) | record of 16 KiB (us) | of 200 bytes (us) |"
    );
    println!("| --- | --- | --- | --- | --- |");
    for (at, (name, group, _)) in cases.iter().enumerate() {
        let figure = |part: usize| median(rounds.iter().map(|round| round[at][part]).collect());
        println!(
            "| {name} | {group:?} | {:.0} | {:.2} | {:.2} |",
            figure(0),
            figure(1),
            figure(2)
        );
    }
}
