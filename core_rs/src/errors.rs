//! One Python exception class per code of the error table.

use helix_wire::error::{Code, CoreError as Failure, ROWS};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyType;

pyo3::create_exception!(
    helixflow.core_rs,
    CoreError,
    PyException,
    "Base of every error that the extension raises on purpose."
);

macro_rules! classes {
    ($($name:ident)*) => {
        $(pyo3::create_exception!(helixflow.core_rs, $name, CoreError);)*

        fn class(py: Python<'_>, code: Code) -> Bound<'_, PyType> {
            match code {
                $(Code::$name => py.get_type::<$name>(),)*
            }
        }
    };
}

classes! {
    InvalidRequest UnsupportedParameter ContextLengthExceeded InvalidApiKey InvalidToken InvalidCredentials
    PermissionDenied PasswordChangeRequired SecondFactorRequired SecondFactorMissing ModelNotFound NotFound Conflict
    MethodNotAllowed PayloadTooLarge
    UnsupportedMediaType QueueFull RateLimitExceeded InsufficientQuota AccountLocked DeadlineExceeded Cancelled
    EngineFailed Unavailable Draining LedgerFull Internal ModelFileError TlsError
}

/// One row of the error table, as Python sees it.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct ErrorRow {
    code: &'static str,
    http_status: u16,
    grpc_status: i32,
    openai_type: &'static str,
    retryable: bool,
    exception: Py<PyType>,
}

/// The error table.
#[pyfunction]
pub(crate) fn error_table(py: Python<'_>) -> Vec<ErrorRow> {
    ROWS.iter()
        .map(|row| ErrorRow {
            code: row.name,
            http_status: row.http,
            grpc_status: row.grpc as i32,
            openai_type: row.openai_type,
            retryable: row.retryable,
            exception: class(py, row.code).unbind(),
        })
        .collect()
}

/// Adds the classes to the module and gives each its row as class attributes.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let base = py.get_type::<CoreError>();
    base.setattr("param", py.None())?;
    base.setattr("retry_after_s", py.None())?;
    module.add("CoreError", base)?;
    for row in ROWS {
        let class = class(py, row.code);
        class.setattr("code", row.name)?;
        class.setattr("retryable", row.retryable)?;
        class.setattr("http_status", row.http)?;
        module.add(class.name()?, &class)?;
    }
    module.add_class::<ErrorRow>()?;
    module.add_function(wrap_pyfunction!(error_table, module)?)
}

/// The exception of an error. (The orphan rule forbids `From` between the two foreign types.)
pub(crate) fn to_py(error: Failure) -> PyErr {
    Python::attach(|py| {
        let raised = PyErr::from_type(class(py, error.code), (error.message,));
        let value = raised.value(py);
        let set = value
            .setattr("param", error.param)
            .and_then(|()| value.setattr("retry_after_s", error.retry_after_s));
        match set {
            Ok(()) => raised,
            Err(failed) => failed,
        }
    })
}
