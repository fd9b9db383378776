//! The tokeniser of a checkpoint, for what is done with a model before a pool serves it.

use std::path::PathBuf;

use helix_text::TextModel;
use helix_wire::error::{Code, CoreError};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Token ids of each text, with the special tokens that the tokeniser adds.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // as PyO3 hands it over
pub(crate) fn encode(
    py: Python<'_>,
    model_dir: PathBuf,
    texts: Vec<String>,
) -> PyResult<Vec<Vec<u32>>> {
    let encoded: Result<_, CoreError> = py.detach(|| {
        let model = TextModel::load(&model_dir)
            .map_err(|error| CoreError::new(Code::ModelFileError, error.to_string()))?;
        texts
            .iter()
            .map(|text| {
                model
                    .encode(text, true)
                    .map_err(|error| CoreError::new(Code::InvalidRequest, error.to_string()))
            })
            .collect()
    });
    encoded.map_err(to_py)
}
