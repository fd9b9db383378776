//! Compiles the protos with protox: a fresh machine has no `protoc`.

use std::path::PathBuf;

use prost::Message as _;

/// Messages and services that Rust code works with.
const TYPED: [&str; 2] = ["helixflow/v1/common.proto", "helixflow/v1/inference.proto"];
/// Handled in Python: Rust carries their messages as bytes and knows their descriptors.
const RAW: [&str; 2] = ["helixflow/v1/auth.proto", "helixflow/v1/admin.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Asked when it runs: two clones that share a target folder share this program, too.
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    let all: Vec<_> = TYPED.into_iter().chain(RAW).collect();
    for file in &all {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptors = protox::compile(all, [&root])?;
    std::fs::write(out.join("helixflow.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".helixflow.v1.TokenLogprob.text")
        .compile_fds(protox::compile(TYPED, [&root])?)?;
    Ok(())
}
