//! Variables of chat templates: JSON from a client to messages between the services.

use helix_wire::error::CoreError;
use helix_wire::v1::value::Kind;
use helix_wire::v1::{Value, ValueList, ValueMap, Variable};
use serde_json::Value as Json;

const PARAM: &str = "chat_template_kwargs";
/// Nesting; templates take flags, texts and short lists.
const MAX_DEPTH: usize = 16;

/// Reads a JSON object.
pub(super) fn read(json: &[u8]) -> Result<Vec<Variable>, CoreError> {
    match serde_json::from_slice(json) {
        Ok(Json::Object(members)) => entries(members, MAX_DEPTH),
        Ok(_) => Err(refused("must be an object")),
        Err(error) => Err(refused(&error.to_string())),
    }
}

fn refused(reason: &str) -> CoreError {
    CoreError::invalid(PARAM, format!("{PARAM}: {reason}"))
}

fn entries(
    members: serde_json::Map<String, Json>,
    depth: usize,
) -> Result<Vec<Variable>, CoreError> {
    let entry = |(name, json)| {
        let value = Some(value(json, depth)?);
        Ok(Variable { name, value })
    };
    members.into_iter().map(entry).collect()
}

fn value(json: Json, depth: usize) -> Result<Value, CoreError> {
    let Some(below) = depth.checked_sub(1) else {
        return Err(refused(&format!(
            "is nested deeper than {MAX_DEPTH} levels"
        )));
    };
    let kind = match json {
        Json::Null => None,
        Json::Bool(flag) => Some(Kind::Flag(flag)),
        Json::Number(number) => Some(match number.as_i64() {
            Some(integer) => Kind::Integer(integer),
            None => Kind::Number(number.as_f64().unwrap_or_default()),
        }),
        Json::String(text) => Some(Kind::Text(text)),
        Json::Array(items) => {
            let values = items.into_iter().map(|item| value(item, below));
            let values = values.collect::<Result<_, _>>()?;
            Some(Kind::List(ValueList { values }))
        }
        Json::Object(members) => {
            let entries = entries(members, below)?;
            Some(Kind::Map(ValueMap { entries }))
        }
    };
    Ok(Value { kind })
}
