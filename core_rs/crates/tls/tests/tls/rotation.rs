//! New certificates under running connections.

use std::fs;
use std::time::Duration;

use helix_tls::ServerTls;
use rustls::version::TLS13;
use tokio::sync::watch;

use crate::log;
use crate::support::{
    CLIENT, Ca, Home, Identity, LIMIT, SERVER, call_raw, gateway, names, pair, pool, put, serial,
};

const TICK: Duration = Duration::from_millis(10);

async fn swapped(swaps: &mut watch::Receiver<u64>, n: u64) {
    tokio::time::timeout(LIMIT, swaps.wait_for(|have| *have >= n))
        .await
        .unwrap()
        .unwrap();
}

async fn seen_by(server: &ServerTls, client: &Identity) -> Result<String, String> {
    let (verdict, _) = call_raw(server, Some(client), &[&TLS13], &[b"h2"]).await;
    verdict.map(|peer| peer.service).map_err(|e| e.to_string())
}

#[tokio::test]
async fn reload_swaps_for_new_connections_and_leaves_running_ones() {
    let ca = Ca::new("ca");
    let (server_home, server) = pool(&ca);
    let (client_home, client) = gateway(&ca);
    let mut old = pair(&server, &client).await;
    let (first_server, first_client) = (server.own(), client.own());

    server_home.put(&ca.server("inference-pool"));
    client_home.put(&ca.client("api-gateway"));
    server.reload().unwrap();
    client.reload().unwrap();
    assert_ne!(server.own(), first_server);
    assert_ne!(client.own(), first_client);
    let mut new = pair(&server, &client).await;
    assert_eq!(new.peer, client.own());
    new.works().await;
    old.works().await;
    assert_eq!(old.peer, first_client);
    assert_eq!(*server.swaps().borrow(), 1);
}

#[tokio::test]
async fn a_new_ca_is_taken_over_through_a_bundle() {
    let (before, after) = (Ca::new("ca 2026"), Ca::new("ca 2027"));
    let (server_home, server) = pool(&before);
    let (client_home, client) = gateway(&before);
    let both = format!("{}{}", before.pem, after.pem);
    put(&server_home.files.ca, &both, 0o644);
    put(&client_home.files.ca, &both, 0o644);
    server.reload().unwrap();
    client.reload().unwrap();
    server_home.put(&after.server("inference-pool"));
    server.reload().unwrap();
    pair(&server, &client).await.works().await;
    client_home.put(&after.client("api-gateway"));
    client.reload().unwrap();
    pair(&server, &client).await.works().await;
}

#[tokio::test]
async fn a_bad_reload_keeps_the_old_ones() {
    let ca = Ca::new("ca");
    let (home, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let own = server.own();
    let good = ca.server("inference-pool");

    put(&home.files.key, &good.key, 0o600);
    assert_eq!(server.reload().unwrap_err().file, home.files.key);
    put(&home.files.cert, "nothing", 0o644);
    assert_eq!(server.reload().unwrap_err().file, home.files.cert);
    fs::remove_file(&home.files.ca).unwrap();
    assert_eq!(server.reload().unwrap_err().file, home.files.ca);
    assert_eq!(server.own(), own);
    assert_eq!(*server.swaps().borrow(), 0);
    pair(&server, &client).await.works().await;

    put(&home.files.ca, &ca.pem, 0o644);
    home.put(&good);
    server.reload().unwrap();
    assert_ne!(server.own(), own);
}

#[tokio::test]
async fn a_list_that_appears_is_honoured_and_may_not_vanish() {
    let ca = Ca::new("ca");
    let (home, server) = pool(&ca);
    let bad = ca.issue("api-gateway", CLIENT, serial(77));
    assert_eq!(seen_by(&server, &bad).await.unwrap(), "api-gateway");

    home.put_crl(&ca.crl(&[77]));
    server.reload().unwrap();
    assert_eq!(
        seen_by(&server, &bad).await.unwrap_err(),
        "peer refused: its certificate is revoked"
    );
    fs::remove_file(home.crl()).unwrap();
    let error = server.reload().unwrap_err();
    assert_eq!(error.file, home.crl());
    assert!(error.reason.contains("is gone"), "{error}");
    assert!(seen_by(&server, &bad).await.is_err());
    home.put_crl("garbage");
    assert_eq!(server.reload().unwrap_err().file, home.crl());
    assert!(seen_by(&server, &bad).await.is_err());
    home.put_crl(&ca.crl(&[]));
    server.reload().unwrap();
    assert_eq!(seen_by(&server, &bad).await.unwrap(), "api-gateway");
}

#[tokio::test]
async fn a_list_is_honoured_even_when_it_names_ourselves() {
    let ca = Ca::new("ca");
    let server = ca.issue("inference-pool", SERVER, serial(7));
    let home = Home::new(&ca, &server);
    let tls = ServerTls::load(home.files.clone(), names(&["api-gateway"])).unwrap();
    let client = ca.issue("api-gateway", CLIENT, serial(8));
    seen_by(&tls, &client).await.unwrap();

    home.put_crl(&ca.crl(&[7, 8]));
    tls.reload().unwrap();
    assert_eq!(
        seen_by(&tls, &client).await.unwrap_err(),
        "peer refused: its certificate is revoked"
    );
}

#[tokio::test]
async fn a_running_peer_can_be_judged_again() {
    let ca = Ca::new("ca");
    let (home, server) = pool(&ca);
    let client_home = Home::new(&ca, &ca.issue("api-gateway", CLIENT, serial(3)));
    let client =
        helix_tls::ClientTls::load(client_home.files.clone(), "inference-pool".into()).unwrap();
    let running = pair(&server, &client).await;
    server.recheck(&running.peer).unwrap();
    home.put_crl(&ca.crl(&[3]));
    server.reload().unwrap();
    assert_eq!(
        server.recheck(&running.peer).unwrap_err().to_string(),
        "peer refused: its certificate is revoked"
    );
}

#[tokio::test]
async fn watching_picks_up_a_change_and_ends_with_its_owner() {
    let ca = Ca::new("ca");
    let (home, server) = pool(&ca);
    let mut swaps = server.swaps();
    let task = server.watch(TICK);
    let first = server.own();
    home.put(&ca.server("inference-pool"));
    swapped(&mut swaps, 1).await;
    assert_ne!(server.own(), first);
    home.put_crl(&ca.crl(&[]));
    swapped(&mut swaps, 2).await;
    drop(server);
    tokio::time::timeout(LIMIT, task).await.unwrap().unwrap();
}

#[tokio::test]
async fn watching_reports_a_bad_change_once_and_recovers() {
    log::start();
    let ca = Ca::new("ca");
    let (home, server) = pool(&ca);
    let mut swaps = server.swaps();
    let _task = server.watch(TICK);
    let folder = home.dir.path();
    let first = server.own();

    // A key without its certificate: refused, said once however often it is tried again.
    let next = ca.server("inference-pool");
    put(&home.files.key, &next.key, 0o600);
    log::wait(folder, 1).await;
    // Ten more ticks, each of them another attempt.
    let mut ticks = tokio::time::interval(TICK);
    for _ in 0..10 {
        ticks.tick().await;
    }
    assert_eq!(server.own(), first);
    let lines = log::about(folder);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("ERROR") && lines[0].contains("does not belong"),
        "{lines:?}"
    );

    put(&home.files.cert, &next.cert, 0o644);
    swapped(&mut swaps, 1).await;
    log::wait(folder, 2).await;
    assert!(log::about(folder)[1].starts_with("INFO"));
    assert_ne!(server.own(), first);
}

#[tokio::test]
async fn watching_does_not_reload_what_did_not_change() {
    let ca = Ca::new("ca");
    let home = Home::new(&ca, &ca.issue("inference-pool", SERVER, |_| {}));
    let server = ServerTls::load(home.files.clone(), names(&["api-gateway"])).unwrap();
    let _task = server.watch(Duration::from_millis(1));
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    for _ in 0..20 {
        ticks.tick().await;
    }
    assert_eq!(*server.swaps().borrow(), 0);
}

#[tokio::test]
async fn a_client_watches_too() {
    let ca = Ca::new("ca");
    let (home, client) = gateway(&ca);
    let mut swaps = client.swaps();
    let _task = client.watch(TICK);
    home.put(&ca.client("api-gateway"));
    swapped(&mut swaps, 1).await;
    let (_a, server) = pool(&ca);
    assert_eq!(pair(&server, &client).await.peer, client.own());
}
