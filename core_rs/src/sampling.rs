//! The host sampler and its noise, for engines that choose tokens themselves.

use std::cell::RefCell;
use std::fmt::Display;

use helix_sample::{CANDIDATES, History, Params, Sampler, fill_gumbel};
use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Less is done before another thread would have woken up to take the GIL.
const MANY_NUMBERS: usize = 4096;
const LONG_ROW: usize = 1 << 15;

thread_local! {
    static SAMPLER: RefCell<Sampler> = RefCell::new(Sampler::new());
}

/// Fills `out[r, rank]` with the noise that the sampler gives the candidate of that rank.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // borrows of arrays, as PyO3 hands them over
pub(crate) fn gumbel(
    py: Python<'_>,
    seeds: PyReadonlyArray1<'_, u64>,
    positions: PyReadonlyArray1<'_, i64>,
    mut out: PyReadwriteArray2<'_, f32>,
) -> PyResult<()> {
    let (rows, columns) = (out.shape()[0], out.shape()[1]);
    if seeds.len() != rows || positions.len() != rows {
        return Err(refused(format!(
            "{} seeds and {} positions for {rows} rows of noise",
            seeds.len(),
            positions.len()
        )));
    }
    if columns > CANDIDATES + 1 {
        return Err(refused(format!(
            "{columns} ranks of noise are asked for; there are {}",
            CANDIDATES + 1
        )));
    }
    plain(&seeds, "seeds")?;
    plain(&positions, "positions")?;
    plain(&out, "out")?;
    let (seeds, positions) = (seeds.as_slice()?, positions.as_slice()?);
    if let Some(position) = positions.iter().find(|position| **position < 0) {
        return Err(refused(format!("position {position} is negative")));
    }
    if columns == 0 {
        return Ok(());
    }
    let out = out.as_slice_mut()?;
    let mut fill = || {
        for ((noise, seed), position) in out.chunks_mut(columns).zip(seeds).zip(positions) {
            fill_gumbel(*seed, position.cast_unsigned(), noise);
        }
    };
    if rows * columns < MANY_NUMBERS {
        fill();
    } else {
        py.detach(fill);
    }
    Ok(())
}

/// The token that a pool draws from a row of logits `[V]`.
#[pyfunction]
#[pyo3(signature = (logits, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position))]
#[allow(clippy::too_many_arguments)] // keyword arguments in Python
#[allow(clippy::needless_pass_by_value)] // a borrow of an array, as PyO3 hands it over
pub(crate) fn sample(
    py: Python<'_>,
    logits: PyReadonlyArray1<'_, f32>,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    seed: u64,
    position: u64,
) -> PyResult<u32> {
    plain(&logits, "logits")?;
    let row = logits.as_slice()?;
    let params = Params {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        ..Params::default()
    };
    params.validate(row.len()).map_err(refused)?;
    let draw = || {
        SAMPLER
            .with_borrow_mut(|sampler| sampler.sample(row, &params, &History::default(), position))
    };
    let drawn = if row.len() < LONG_ROW {
        draw()
    } else {
        py.detach(draw)
    };
    drawn.map_err(refused)
}

/// Refuses an array that cannot be read as a slice.
fn plain<T: Element, D: Dimension>(array: &Bound<'_, PyArray<T, D>>, name: &str) -> PyResult<()> {
    if array.is_c_contiguous() && array.data().is_aligned() {
        return Ok(());
    }
    Err(refused(format!("{name} must be C-contiguous and aligned")))
}

fn refused(reason: impl Display) -> PyErr {
    PyValueError::new_err(reason.to_string())
}
