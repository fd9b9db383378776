//! The three modes: each runs for a bounded time and returns one JSON object.

use crate::args::Args;
use crate::conn::{Connection, Target};
use crate::sse::Events;
use crate::stats::{Errors, Samples, rate};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::timeout_at;

/// How long exchanges that are under way may go on when the measurement is over.
const GRACE: Duration = Duration::from_secs(20);
/// Pause behind a failed exchange, so that a refusing server is not hammered.
const PAUSE: Duration = Duration::from_millis(20);
/// Limit of one handshake with its request.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// The clock of a run: warm-up, measurement, grace.
#[derive(Clone)]
struct Clock {
    from: Instant,
    until: Instant,
    left: Arc<AtomicU64>,
}

impl Clock {
    fn start(args: &Args) -> Self {
        let from = Instant::now() + args.warmup;
        Self {
            from,
            until: from + args.duration,
            left: Arc::new(AtomicU64::new(args.requests.unwrap_or(u64::MAX))),
        }
    }

    fn running(&self) -> bool {
        Instant::now() < self.until && self.left.load(Ordering::Relaxed) > 0
    }

    fn hard_limit(&self) -> tokio::time::Instant {
        (self.until + GRACE).into()
    }

    /// Whether an exchange that began at `began` is measured; takes one of the `--requests`.
    fn measures(&self, began: Instant) -> bool {
        began >= self.from
            && self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
    }
}

/// Keep-alive connections, one request after another on each.
pub(crate) async fn requests(args: &Args) -> Result<Value, String> {
    let target = Arc::new(Target::new(args, true)?);
    let clock = Clock::start(args);
    let mut workers = JoinSet::new();
    for _ in 0..args.connections {
        workers.spawn(request_worker(Arc::clone(&target), clock.clone()));
    }
    let mut latency = Samples::default();
    let mut errors = Errors::default();
    let mut last = clock.from;
    while let Some(Ok((samples, failures, end))) = workers.join_next().await {
        latency.append(samples);
        errors.append(failures);
        last = last.max(end);
    }
    let window = last - clock.from;
    Ok(json!({
        "mode": "requests",
        "connections": args.connections,
        "seconds": window.as_secs_f64(),
        "requests": latency.len(),
        "requests_per_s": rate(to_f64(latency.len() as u64), window),
        "latency_ms": latency.summary(),
        "errors": errors.summary(),
    }))
}

async fn request_worker(target: Arc<Target>, clock: Clock) -> (Samples, Errors, Instant) {
    let (mut latency, mut errors, mut last) = (Samples::default(), Errors::default(), clock.from);
    let mut connection: Option<Connection> = None;
    while clock.running() {
        let began = Instant::now();
        let outcome = timeout_at(clock.hard_limit(), exchange(&target, &mut connection)).await;
        let end = Instant::now();
        match outcome.unwrap_or_else(|_| Err("timeout".to_owned())) {
            Ok(200..=299) => {
                // Started before the end but finished behind it: counted nowhere, as in a fixed window.
                if end <= clock.until && clock.measures(began) {
                    latency.push(end - began);
                    last = end;
                }
            }
            Ok(status) => {
                errors.add(format!("status {status}"));
                last = last.max(end.min(clock.until));
            }
            Err(message) => {
                errors.add(message);
                connection = None;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    (latency, errors, last)
}

async fn exchange(target: &Target, connection: &mut Option<Connection>) -> Result<u16, String> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => target.connect().await?,
    };
    let mut head = open.send(target).await?;
    open.body(&mut head, |_| ()).await?;
    if head.keep_alive {
        *connection = Some(open);
    }
    Ok(head.status)
}

/// What the streams of one worker showed inside the measured window.
#[derive(Default)]
struct Streamed {
    streams: u64,
    unfinished: u64,
    events: u64,
    bytes: u64,
    tokens: f64,
    first: Samples,
    gaps: Samples,
    errors: Errors,
}

impl Streamed {
    fn append(&mut self, other: Self) {
        self.streams += other.streams;
        self.unfinished += other.unfinished;
        self.events += other.events;
        self.bytes += other.bytes;
        self.tokens += other.tokens;
        self.first.append(other.first);
        self.gaps.append(other.gaps);
        self.errors.append(other.errors);
    }
}

/// Concurrent SSE streams, each followed by another until the time is over.
pub(crate) async fn stream(args: &Args) -> Result<Value, String> {
    let target = Arc::new(Target::new(args, true)?);
    let clock = Clock::start(args);
    let mut workers = JoinSet::new();
    for _ in 0..args.connections {
        workers.spawn(stream_worker(Arc::clone(&target), clock.clone()));
    }
    let mut total = Streamed::default();
    while let Some(Ok(part)) = workers.join_next().await {
        total.append(part);
    }
    // With --requests the run may end early; the window then ends with its last exchange.
    let window = if args.requests.is_some() {
        Instant::now().min(clock.until) - clock.from
    } else {
        args.duration
    };
    Ok(json!({
        "mode": "stream",
        "connections": args.connections,
        "seconds": window.as_secs_f64(),
        "streams": total.streams,
        "unfinished": total.unfinished,
        "tokens_per_s": rate(total.tokens, window),
        "events_per_s": rate(to_f64(total.events), window),
        "bytes_per_s": rate(to_f64(total.bytes), window),
        "first_token_ms": total.first.summary(),
        "event_gap_ms": total.gaps.summary(),
        "errors": total.errors.summary(),
    }))
}

async fn stream_worker(target: Arc<Target>, clock: Clock) -> Streamed {
    let mut seen = Streamed::default();
    let mut connection = None;
    while clock.running() {
        let run = one_stream(&target, &mut connection, &clock, &mut seen);
        match timeout_at(clock.hard_limit(), run).await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                seen.errors.add(message);
                connection = None;
                tokio::time::sleep(PAUSE).await;
            }
            Err(_) => seen.unfinished += 1,
        }
    }
    seen
}

async fn one_stream(
    target: &Target,
    connection: &mut Option<Connection>,
    clock: &Clock,
    seen: &mut Streamed,
) -> Result<(), String> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => target.connect().await?,
    };
    let began = Instant::now();
    let measured = clock.measures(began);
    let mut head = open.send(target).await?;
    if !(200..300).contains(&head.status) {
        open.body(&mut head, |_| ()).await?;
        return Err(format!("status {}", head.status));
    }
    let mut events = Events::default();
    let mut last_event: Option<Instant> = None;
    let mut inside = 0;
    open.body(&mut head, |bytes| {
        let (before, had_text) = (events.count, events.text_seen);
        events.feed(bytes);
        let now = Instant::now();
        let fresh = events.count - before;
        if measured && !had_text && events.text_seen {
            seen.first.push(now - began);
        }
        if now < clock.from || now > clock.until {
            last_event = Some(now);
            return;
        }
        seen.bytes += bytes.len() as u64;
        for index in 0..fresh {
            // Events of one read arrived together: only the first of them waited.
            let gap = if index > 0 {
                Some(Duration::ZERO)
            } else {
                last_event.map(|last| now - last)
            };
            if let Some(gap) = gap {
                seen.gaps.push(gap);
            }
        }
        if fresh > 0 {
            last_event = Some(now);
        }
        inside += fresh;
    })
    .await?;
    seen.events += inside;
    if let Some(code) = events.error {
        return Err(format!("error event {code}"));
    }
    if !events.done || events.broken {
        return Err("stream without a proper end".to_owned());
    }
    let tokens = to_f64(events.usage_tokens().unwrap_or(events.count));
    // The usage counts the whole stream: give the window its share by events.
    seen.tokens += tokens * to_f64(inside) / to_f64(events.count.max(1));
    seen.streams += u64::from(inside > 0);
    if head.keep_alive {
        *connection = Some(open);
    }
    Ok(())
}

/// Full, then resumed handshakes, one after another.
pub(crate) async fn handshake(args: &Args) -> Result<Value, String> {
    let count = args.requests.unwrap_or(200);
    let (full, _) = handshakes(&Target::new(args, false)?, count).await?;
    // The first connection of the second round has no ticket yet.
    let (_, resumed) = handshakes(&Target::new(args, true)?, count + 1).await?;
    Ok(json!({
        "mode": "handshake",
        "full_ms": full.summary(),
        "resumed": resumed.len(),
        "resumed_ms": resumed.summary(),
    }))
}

/// Times of `count` handshakes, full and resumed apart, each with one request: TLS 1.3 tickets arrive late.
async fn handshakes(target: &Target, count: u64) -> Result<(Samples, Samples), String> {
    let (mut full, mut resumed) = (Samples::default(), Samples::default());
    for _ in 0..count {
        let run = async {
            let tcp = target.tcp().await?;
            let began = Instant::now();
            let mut connection = target.handshake(tcp).await?;
            let took = began.elapsed();
            let mut head = connection.send(target).await?;
            connection.body(&mut head, |_| ()).await?;
            Ok::<_, String>((took, connection.resumed()))
        };
        let limit = tokio::time::timeout(HANDSHAKE_LIMIT, run).await;
        let (took, was_resumed) =
            limit.map_err(|_| "a handshake took longer than 10 s".to_owned())??;
        if was_resumed { &mut resumed } else { &mut full }.push(took);
    }
    Ok((full, resumed))
}

#[allow(
    clippy::cast_precision_loss,
    reason = "counts of a run are far below 2^52"
)]
fn to_f64(count: u64) -> f64 {
    count as f64
}
