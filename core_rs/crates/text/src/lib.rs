//! Text on both sides of a language model: tokeniser, chat template, incremental
//! detokeniser, stop strings, and the bytes of `OpenAI`'s API.
//!
//! Pure: files are read once, in [`TextModel::load`]; everything else is memory in, memory out.

mod bytes;
mod chat;
mod control;
mod detok;
mod growth;
mod jinja;
mod json_size;
mod load;
mod model;
pub mod openai;
mod python_json;
mod stop;
mod template;
mod vocabulary;

pub use chat::{Chat, Message, ToolCall};
pub use detok::Detokenizer;
pub use json_size::json_within;
pub use load::LoadError;
pub use minijinja::Value as TemplateValue;
pub use model::{EncodeError, TextModel};
pub use stop::{Out, StopMatcher};
pub use template::TemplateError;
