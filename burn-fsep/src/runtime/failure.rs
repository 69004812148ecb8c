//! How errors leave what cannot return them: Burn's modules and its backward pass.

use crate::{FsepError, burn_compat::panic_message, error};

use super::{FsepRuntime, fsep_runtime::Inner};

impl FsepRuntime {
    /// Runs a part of a step (forward, backward, gradient synchronisation) and returns a typed error where it fails.
    ///
    /// Burn's modules and its backward pass return no errors, so FSEP's operations unwind when a collective fails: inside
    /// `run` with the error as payload, which prints nothing, elsewhere as a panic with its message.
    /// This catches it, and any other panic, and lets the other ranks know: they get an error that names this
    /// rank instead of waiting for it. A rank without peers can go on after an error.
    ///
    /// ```
    /// # use burn_fsep::FsepRuntime;
    /// let runtime = FsepRuntime::single();
    /// let result = runtime.run(|| panic!("out of luck"));
    /// assert_eq!(result.unwrap_err().to_string(), "the step panicked: out of luck");
    /// ```
    ///
    /// # Errors
    ///
    /// The [`FsepError`] that ended the step, or [`FsepError::Panicked`].
    pub fn run<T>(&self, step: impl FnOnce() -> T) -> Result<T, FsepError> {
        error::catch(step).map_err(|payload| {
            self.outputs.clear();
            self.inner.schedule.reset();
            match payload.downcast::<FsepError>() {
                Ok(error) => *error,
                Err(payload) => {
                    let message = panic_message(payload.as_ref());
                    self.inner.tell_peers(&format!("panicked: {message}"));
                    FsepError::Panicked(message)
                }
            }
        })
    }

    /// Ends the group because of an error that this rank returns, unless it is alone.
    pub(crate) fn tell_peers(&self, error: &FsepError) {
        self.inner.tell_peers(&error.to_string());
    }

    /// Ends the group with an error and unwinds to [`FsepRuntime::run`].
    pub(crate) fn fail(&self, error: FsepError) -> ! {
        self.inner.fail(error)
    }
}

impl Inner {
    pub fn fail(&self, error: FsepError) -> ! {
        self.tell_peers(&error.to_string());
        error::throw(error, self.groups.world().rank())
    }

    /// Ends the group, unless this rank is alone: then nobody waits for it, and it can go on.
    pub fn tell_peers(&self, reason: &str) {
        let world = self.groups.world();
        if world.size() > 1 {
            world.abort(reason);
        }
    }
}
