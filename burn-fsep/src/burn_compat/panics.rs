use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Calls something of Burn's that panics where it could return an error; the panic's message is the error.
///
/// Relied on: such panics unwind and are raised before anything is changed. Their message is printed, too.
///
/// # Errors
///
/// The panic's message.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| panic_message(payload.as_ref()))
}

/// The text of a panic.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_string()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_all_kinds_are_kept() {
        assert_eq!(catch_panic(|| 5), Ok(5));
        assert_eq!(catch_panic(|| panic!("one of {}", 2)), Err::<(), _>("one of 2".into()));
        assert_eq!(catch_panic(|| panic!("constant")), Err::<(), _>("constant".into()));
        let other = catch_panic(|| std::panic::panic_any(7));
        assert_eq!(other, Err::<(), _>("a panic without a message".into()));
    }
}
