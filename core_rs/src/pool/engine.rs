//! A Python engine behind the interface of the engine loop. The only place where a step meets the GIL.

use std::fmt::Display;

use helix_pool::{Candidates, Capacity, StepEngine};
use helix_wire::error::{Code, CoreError};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;

use crate::errors::to_py;

/// One engine step, packed.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct Batch {
    token_ids: Py<PyArray1<i32>>,
    slots: Py<PyArray1<i32>>,
    past: Py<PyArray1<i32>>,
    counts: Py<PyArray1<i32>>,
    wanted: Py<PyArray1<i32>>,
    sampling: Option<Py<Sampling>>,
}

impl Batch {
    fn new(py: Python<'_>, batch: &helix_pool::Batch) -> PyResult<Self> {
        let sampling = batch.sampling.as_ref();
        Ok(Self {
            token_ids: array(py, &batch.token_ids),
            slots: array(py, &batch.slots),
            past: array(py, &batch.past),
            counts: array(py, &batch.counts),
            wanted: array(py, &batch.wanted),
            sampling: sampling
                .map(|sampling| Py::new(py, Sampling::new(py, sampling)))
                .transpose()?,
        })
    }
}

/// How the wanted rows of a step become tokens.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct Sampling {
    inverse_temperature: Py<PyArray1<f32>>,
    top_p: Py<PyArray1<f32>>,
    top_k: Py<PyArray1<i32>>,
    min_p: Py<PyArray1<f32>>,
    seed: Py<PyArray1<u64>>,
    position: Py<PyArray1<i64>>,
    on_host: Py<PyArray1<bool>>,
}

impl Sampling {
    fn new(py: Python<'_>, sampling: &helix_pool::Sampling) -> Self {
        Self {
            inverse_temperature: array(py, &sampling.inverse_temperature),
            top_p: array(py, &sampling.top_p),
            top_k: array(py, &sampling.top_k),
            min_p: array(py, &sampling.min_p),
            seed: array(py, &sampling.seed),
            position: array(py, &sampling.position),
            on_host: array(py, &sampling.on_host),
        }
    }
}

fn array<T: Element>(py: Python<'_>, values: &[T]) -> Py<PyArray1<T>> {
    PyArray1::from_slice(py, values).unbind()
}

pub(crate) struct PyEngine {
    engine: Py<PyAny>,
    held: Held,
}

/// The arrays of the latest step, kept alive while the engine loop reads them.
#[derive(Default)]
struct Held {
    logits: Option<View<f32>>,
    tokens: Option<View<i32>>,
}

/// The data of a C-contiguous array, readable without the GIL.
struct View<T> {
    _owner: Py<PyAny>,
    data: *const T,
    len: usize,
}

// SAFETY: the pointer is only read, and `_owner` keeps what it points to alive; Python reference counts are
// touched under the GIL only (`Py` defers them otherwise).
#[allow(unsafe_code)]
unsafe impl<T: Sync> Send for View<T> {}

impl<T> View<T> {
    fn as_slice(&self) -> &[T] {
        debug_assert!(!self.data.is_null() || self.len == 0);
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `data` and `len` come from a C-contiguous array of this element type that `_owner` keeps
        // alive; numpy refuses to resize an array that is referenced elsewhere. The protocol says that the
        // engine writes to it only in its next `step`, which this thread calls after the slice is gone.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.data, self.len)
        }
    }
}

impl View<i32> {
    /// Rows that the engine has not chosen from.
    fn open(&self) -> usize {
        self.as_slice().iter().filter(|token| **token == -1).count()
    }
}

impl PyEngine {
    pub(crate) fn new(engine: Py<PyAny>) -> Self {
        Self {
            engine,
            held: Held::default(),
        }
    }
}

impl StepEngine for PyEngine {
    type Error = PyErr;

    fn capacity(&mut self) -> PyResult<Capacity> {
        Python::attach(|py| {
            let capacity = self.engine.bind(py).call_method0(intern!(py, "capacity"))?;
            let capacity = Capacity {
                slots: capacity.getattr(intern!(py, "slots"))?.extract()?,
                max_len: capacity.getattr(intern!(py, "max_len"))?.extract()?,
                vocab_size: capacity.getattr(intern!(py, "vocab_size"))?.extract()?,
                candidates: capacity.getattr(intern!(py, "candidates"))?.extract()?,
            };
            if capacity.slots == 0 || capacity.max_len < 2 || capacity.vocab_size == 0 {
                return Err(failed(format!(
                    "the engine's capacity is unusable: {capacity:?}"
                )));
            }
            Ok(capacity)
        })
    }

    fn copy_prefix(&mut self, src: usize, dst: usize, len: usize) -> PyResult<()> {
        Python::attach(|py| {
            self.engine
                .bind(py)
                .call_method1(intern!(py, "copy_prefix"), (src, dst, len))?;
            Ok(())
        })
    }

    fn step(&mut self, batch: &helix_pool::Batch) -> PyResult<Candidates<'_>> {
        let rows = batch.rows();
        self.held = Python::attach(|py| {
            // The arrays of the step before go first, so that their memory can be used again.
            self.held = Held::default();
            let packed = Batch::new(py, batch)?;
            let result = self
                .engine
                .bind(py)
                .call_method1(intern!(py, "step"), (packed,))?;
            if rows == 0 {
                return Ok::<_, PyErr>(Held::default());
            }
            let logits = result.getattr(intern!(py, "logits"))?;
            let tokens = result.getattr(intern!(py, "token_ids"))?;
            let tokens = (logits.is_none() || !tokens.is_none())
                .then(|| tokens_of(&tokens, rows))
                .transpose()?;
            let open = tokens.as_ref().map_or(rows, View::open);
            let logits = (!logits.is_none())
                .then(|| logits_of(&logits, open))
                .transpose()?;
            Ok(Held { logits, tokens })
        })?;
        let logits = self.held.logits.as_ref().map(View::as_slice);
        let tokens = self.held.tokens.as_ref().map(View::as_slice);
        Ok(match (tokens, logits) {
            (None, logits) => Candidates::Logits(logits.unwrap_or_default()),
            (Some(tokens), None) => Candidates::Tokens(tokens),
            (Some(tokens), Some(logits)) => Candidates::Mixed { tokens, logits },
        })
    }
}

fn logits_of(value: &Bound<'_, PyAny>, rows: usize) -> PyResult<View<f32>> {
    let Ok(array) = value.cast::<PyArray2<f32>>() else {
        return Err(failed(format!(
            "engine.step must return logits as float32 [R, V], not {}",
            described(value)
        )));
    };
    if array.shape()[0] != rows {
        return Err(failed(format!(
            "engine.step returned {} rows of logits for {rows}",
            array.shape()[0]
        )));
    }
    if !(array.is_c_contiguous() && array.data().is_aligned()) {
        return Err(failed(
            "engine.step must return C-contiguous, aligned logits",
        ));
    }
    Ok(View {
        data: array.data(),
        len: array.len(),
        _owner: value.clone().unbind(),
    })
}

fn tokens_of(value: &Bound<'_, PyAny>, rows: usize) -> PyResult<View<i32>> {
    let Ok(array) = value.cast::<PyArray1<i32>>() else {
        return Err(failed(format!(
            "engine.step must return token_ids as int32 [R], not {}",
            described(value)
        )));
    };
    if array.len() != rows {
        return Err(failed(format!(
            "engine.step returned {} token ids for {rows} rows",
            array.len()
        )));
    }
    if !(array.is_c_contiguous() && array.data().is_aligned()) {
        return Err(failed(
            "engine.step must return C-contiguous, aligned token_ids",
        ));
    }
    Ok(View {
        data: array.data(),
        len: array.len(),
        _owner: value.clone().unbind(),
    })
}

/// Type, and for arrays element type and shape.
fn described(value: &Bound<'_, PyAny>) -> String {
    let attribute = |name: &str| value.getattr(name).map(|found| found.to_string());
    match (attribute("dtype"), attribute("shape")) {
        (Ok(dtype), Ok(shape)) => format!("{dtype} {shape}"),
        _ => value.get_type().to_string(),
    }
}

fn failed(message: impl Display) -> PyErr {
    to_py(CoreError::new(Code::EngineFailed, message.to_string()))
}
