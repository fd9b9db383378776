//! The Rust extension of `HelixFlow`: the only crate that names `PyO3`. This file is its export list.

mod append;
mod call;
mod client;
mod errors;
mod front;
mod logs;
mod outgoing;
mod pool;
mod ready;
mod rpc;
mod runtime;
mod sampling;
mod text;
mod tls;

use pyo3::prelude::*;

/// Everything Python sees of the extension; its contract is `helixflow/core_rs.pyi`.
#[pymodule(gil_used = true)]
fn core_rs(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(module)?;
    module.add_function(wrap_pyfunction!(logs::init_logging, module)?)?;
    module.add_function(wrap_pyfunction!(logs::log_line, module)?)?;
    module.add_function(wrap_pyfunction!(logs::log_text, module)?)?;
    module.add_function(wrap_pyfunction!(logs::log_first, module)?)?;
    module.add_function(wrap_pyfunction!(logs::log_counts, module)?)?;
    module.add_function(wrap_pyfunction!(logs::log_forked, module)?)?;
    module.add_function(wrap_pyfunction!(logs::flush_logs, module)?)?;
    module.add_function(wrap_pyfunction!(client::request::json_within, module)?)?;
    module.add_function(wrap_pyfunction!(append::append, module)?)?;
    module.add_function(wrap_pyfunction!(sampling::gumbel, module)?)?;
    module.add_function(wrap_pyfunction!(sampling::sample, module)?)?;
    module.add_function(wrap_pyfunction!(text::encode, module)?)?;
    module.add_class::<tls::TlsFiles>()?;
    module.add_class::<client::request::Prompt>()?;
    module.add_class::<client::request::Owner>()?;
    module.add_class::<client::request::GenerateRequest>()?;
    module.add_class::<client::info::Usage>()?;
    module.add_class::<client::info::ModelInfo>()?;
    module.add_class::<client::info::PoolInfo>()?;
    module.add_class::<call::Call>()?;
    module.add_class::<client::PoolClient>()?;
    module.add_function(wrap_pyfunction!(rpc::descriptors, module)?)?;
    module.add_class::<rpc::RpcIncoming>()?;
    module.add_class::<rpc::RpcServer>()?;
    module.add_class::<rpc::RpcCall>()?;
    module.add_class::<rpc::RpcClient>()?;
    module.add_class::<pool::Batch>()?;
    module.add_class::<pool::Sampling>()?;
    module.add_class::<pool::PoolOptions>()?;
    module.add_class::<pool::PoolStats>()?;
    module.add_class::<pool::Stuck>()?;
    module.add_class::<pool::Pool>()?;
    module.add_class::<front::FrontOptions>()?;
    module.add_class::<front::Front>()?;
    Ok(())
}
