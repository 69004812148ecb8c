//! JSON that is not trusted: of bounded size, and no key twice, of which readers take one or the other.

use std::{fmt, fs::File, io::Read, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

use super::{HubError, regular_file::regular_file};

pub(super) type Object = Map<String, Value>;

/// Reads a file that holds an object.
///
/// # Errors
///
/// [`HubError::Io`]; [`HubError::Damaged`] if it is larger than `limit` or anything else than an object without duplicate keys.
pub(super) fn read_object(path: &Path, limit: u64) -> Result<Object, HubError> {
    let len = regular_file(path)?.len();
    if len > limit {
        return Err(HubError::damaged(path, format!("it has {len} bytes, more than any such file ({limit})")));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    let file = File::open(path).map_err(HubError::io("open", path))?;
    file.take(limit).read_to_end(&mut bytes).map_err(HubError::io("read", path))?;
    parse_object(path, &bytes, "it")
}

/// `what` of the file is to be an object.
pub(super) fn parse_object(path: &Path, bytes: &[u8], what: &str) -> Result<Object, HubError> {
    match serde_json::from_slice::<Strict>(bytes) {
        Ok(Strict(Value::Object(object))) => Ok(object),
        Ok(_) => Err(HubError::damaged(path, format!("{what} is no JSON object"))),
        Err(error) => Err(HubError::damaged(path, format!("{what} is no JSON object: {error}"))),
    }
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = access.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, Strict(value))) = access.next_entry::<String, _>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("the key `{key}` stands twice")));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stand_once() {
        let parse = |text: &str| parse_object(Path::new("x.json"), text.as_bytes(), "it");
        assert_eq!(parse(r#"{"a":[1,-2,0.5,null,true,{"b":"c"}]}"#).unwrap()["a"][5]["b"], "c");
        for text in [r#"{"a":1,"a":1}"#, r#"{"x":[{"a":1,"a":2}]}"#] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("x.json is damaged") && error.contains("the key `a` stands twice"), "{error}");
        }
        for text in ["", "[]", "{]", "{} {}", r#"{"a":NaN}"#, &"[".repeat(100_000)] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
