//! Load for a `HelixFlow` gateway on the same machine: requests, streams, handshakes.
//!
//! Single-threaded, so that a bench on a small machine knows what the client costs.

mod args;
mod bench;
mod conn;
mod http;
mod sse;
mod stats;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return say(std::io::stdout(), args::USAGE, ExitCode::SUCCESS);
    }
    let parsed = match args::parse(words) {
        Ok(parsed) => parsed,
        Err(message) => {
            return say(
                std::io::stderr(),
                &format!("helix-loadgen: {message}\n\n{}", args::USAGE),
                ExitCode::from(64),
            );
        }
    };
    match run(&parsed) {
        Ok(report) => say(std::io::stdout(), &report.to_string(), ExitCode::SUCCESS),
        Err(message) => say(
            std::io::stderr(),
            &format!("helix-loadgen: {message}"),
            ExitCode::FAILURE,
        ),
    }
}

fn run(args: &args::Args) -> Result<serde_json::Value, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    runtime.block_on(async {
        match args.mode {
            args::Mode::Requests => bench::requests(args).await,
            args::Mode::Stream => bench::stream(args).await,
            args::Mode::Handshake => bench::handshake(args).await,
        }
    })
}

fn say(mut to: impl Write, text: &str, code: ExitCode) -> ExitCode {
    if writeln!(to, "{text}").is_ok() {
        code
    } else {
        ExitCode::FAILURE
    }
}
