use std::path::Path;

use serde_json::Value;

use super::{HubError, json::Object};

/// More than any size of a model, and far from where products of sizes overflow.
const MAX: u64 = i32::MAX as u64;

/// The keys of a `config.json`, or of an object in it, whose errors name the key.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub file: &'a Path,
    pub object: &'a Object,
    /// What stands before the keys in errors.
    pub prefix: &'a str,
}

impl<'a> Keys<'a> {
    pub fn error(&self, key: &str, reason: impl Into<String>) -> HubError {
        let key = format!("{}{key}", self.prefix);
        HubError::Config { file: self.file.to_path_buf(), key, reason: reason.into() }
    }

    /// The value, if there is one that is not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn read<T>(&self, key: &str, what: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>, HubError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(key, format!("is {value}, not {what}"))),
        }
    }

    fn or_missing<T>(&self, key: &str, value: Option<T>) -> Result<T, HubError> {
        value.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn find_usize(&self, key: &str) -> Result<Option<usize>, HubError> {
        let read = |value: &Value| value.as_u64().filter(|value| *value <= MAX).map(|value| value as usize);
        self.read(key, "a whole number below 2^31", read)
    }

    pub fn usize(&self, key: &str) -> Result<usize, HubError> {
        self.or_missing(key, self.find_usize(key)?)
    }

    /// A number that is at least 1.
    pub fn size(&self, key: &str) -> Result<usize, HubError> {
        match self.usize(key)? {
            0 => Err(self.error(key, "is 0")),
            size => Ok(size),
        }
    }

    pub fn find_f64(&self, key: &str) -> Result<Option<f64>, HubError> {
        self.read(key, "a number", Value::as_f64)
    }

    pub fn f64(&self, key: &str) -> Result<f64, HubError> {
        self.or_missing(key, self.find_f64(key)?)
    }

    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64, HubError> {
        Ok(self.find_f64(key)?.unwrap_or(default))
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, HubError> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn find_str(&self, key: &str) -> Result<Option<&'a str>, HubError> {
        self.read(key, "a word", Value::as_str)
    }

    pub fn find_object(&self, key: &'a str, prefix: &'a str) -> Result<Option<Keys<'a>>, HubError> {
        let object = self.read(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Keys { file: self.file, object, prefix }))
    }

    /// Whole numbers, if there are any: a list, or one by itself.
    pub fn usizes(&self, key: &str) -> Result<Vec<usize>, HubError> {
        let one = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
        let list = |value: &'a Value| match value {
            Value::Array(values) => values.iter().map(one).collect(),
            value => one(value).map(|value| vec![value]),
        };
        Ok(self.read(key, "a list of whole numbers", list)?.unwrap_or_default())
    }

    pub fn find_f64s(&self, key: &str) -> Result<Option<Vec<f64>>, HubError> {
        self.read(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    pub fn find_strs(&self, key: &str) -> Result<Option<Vec<&'a str>>, HubError> {
        self.read(key, "a list of words", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A size that has had two names.
    pub fn size_of_either(&self, key: &str, other: &str) -> Result<usize, HubError> {
        match (self.find_usize(key)?, self.find_usize(other)?) {
            (Some(a), Some(b)) if a != b => Err(self.error(key, format!("is {a}, but `{other}` is {b}"))),
            (None, Some(_)) => self.size(other),
            _ => self.size(key),
        }
    }
}
