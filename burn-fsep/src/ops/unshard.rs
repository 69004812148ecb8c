use std::{any::Any, fmt, sync::Arc};

use burn::tensor::Tensor;
use burn_fsep_planner::Layout;
use parking_lot::Mutex;

use crate::{FsepError, comm::Operation};

/// What an unshard holds from its start on; of a type of the backend's.
pub type Started = Box<dyn Any + Send>;

/// Starts an unshard of these shards, `[E, S]`.
pub type StartUnshard = Box<dyn FnOnce(Tensor<2>) -> Result<Started, FsepError> + Send>;

/// An unshard of one layer's experts to this rank's slots, for one forward or backward pass.
///
/// It knows how to start, so a layer can start another one's without knowing its backend. Its states, and what each call
/// makes of them:
///
/// | state | `start` | `keep` | `take` | `discard` |
/// | --- | --- | --- | --- | --- |
/// | planned | started | kept | error | discarded |
/// | started: the experts travel | - | error | taken | discarded |
/// | kept: they are there since another pass | - | error | taken | discarded |
/// | taken: the layer computes with them | error | error | error | - |
/// | discarded: nobody will come for them | error | error | error | - |
///
/// `-` changes nothing, nor does an error. An unshard whose start fails is discarded.
pub struct Unshard {
    /// What it is called in errors and signatures.
    pub operation: Operation,
    /// The layout that it follows.
    pub layout: Arc<Layout>,
    /// This rank's shards, without autodiff. `[E, S]`
    pub weights: Tensor<2>,
    state: Mutex<State>,
}

enum State {
    Planned(StartUnshard),
    Started(Started),
    Kept(Started),
    Taken,
    Discarded,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::Planned(_) => "not started",
            State::Started(_) => "started",
            State::Kept(_) => "kept",
            State::Taken => "taken already",
            State::Discarded => "discarded",
        }
    }
}

impl fmt::Debug for Unshard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unshard({}, {})", self.operation, self.state.lock().name())
    }
}

impl Unshard {
    /// A planned unshard.
    pub fn new(operation: Operation, layout: Arc<Layout>, weights: Tensor<2>, start: StartUnshard) -> Self {
        Self { operation, layout, weights, state: Mutex::new(State::Planned(start)) }
    }

    /// Starts it, unless that was done already.
    ///
    /// # Errors
    ///
    /// What its start returns; [`FsepError::Unshard`] if it was taken or discarded.
    pub fn start(&self) -> Result<(), FsepError> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, State::Discarded) {
            State::Planned(start) => *state = State::Started(start(self.weights.clone())?),
            other => *state = other,
        }
        match *state {
            State::Started(_) | State::Kept(_) => Ok(()),
            _ => Err(self.illegal("started", &state)),
        }
    }

    /// Whether nothing has happened to it.
    pub fn is_planned(&self) -> bool {
        matches!(*self.state.lock(), State::Planned(_))
    }

    /// Keeps experts of another pass for it, in place of a start.
    ///
    /// # Errors
    ///
    /// [`FsepError::Unshard`] unless it is planned.
    pub fn keep<W: Send + 'static>(&self, weights: W) -> Result<(), FsepError> {
        let mut state = self.state.lock();
        match *state {
            State::Planned(_) => *state = State::Kept(Box::new(weights)),
            _ => return Err(self.illegal("kept", &state)),
        }
        Ok(())
    }

    /// What it holds, for the layer that computes now.
    ///
    /// # Errors
    ///
    /// [`FsepError::Unshard`] unless it is started or kept; [`FsepError::Backend`] if what it holds is not a `W`.
    pub fn take<W: 'static>(&self) -> Result<W, FsepError> {
        let mut state = self.state.lock();
        let held = match std::mem::replace(&mut *state, State::Taken) {
            State::Started(held) | State::Kept(held) => held,
            other => {
                *state = other;
                return Err(self.illegal("taken", &state));
            }
        };
        held.downcast().map(|held| *held).map_err(|_| FsepError::Backend {
            operation: self.operation.to_string(),
            reason: "it was started on another backend than the layer runs on".into(),
        })
    }

    /// Frees what it holds: nobody will take it.
    pub fn discard(&self) {
        let mut state = self.state.lock();
        if !matches!(*state, State::Taken) {
            *state = State::Discarded;
        }
    }

    fn illegal(&self, action: &'static str, state: &State) -> FsepError {
        FsepError::Unshard { operation: self.operation.to_string(), action, state: state.name() }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn planned(start: impl FnOnce(Tensor<2>) -> Result<Started, FsepError> + Send + 'static) -> Unshard {
        let layout = Arc::new(Layout::static_ep(1, 2, 2).unwrap());
        let weights = Tensor::zeros([2, 3], &Device::flex());
        Unshard::new(Operation::of_layer("unshard", 4), layout, weights, Box::new(start))
    }

    /// An unshard in the state of this name.
    fn in_state(name: &str) -> Unshard {
        let unshard = planned(|weights| Ok(Box::new(weights.dims()[1])));
        match name {
            "not started" => {}
            "started" => unshard.start().unwrap(),
            "kept" => unshard.keep(7usize).unwrap(),
            "taken already" => {
                unshard.start().unwrap();
                unshard.take::<usize>().unwrap();
            }
            _ => unshard.discard(),
        }
        assert!(format!("{unshard:?}").ends_with(&format!(", {name})")), "{unshard:?}");
        unshard
    }

    #[test]
    fn every_call_in_every_state() {
        let (planned, started, kept, taken, discarded) =
            ("not started", "started", "kept", "taken already", "discarded");
        // The state after `start`, `keep`, `take` and `discard`; `None` is an error.
        for (from, after) in [
            (planned, [Some(started), Some(kept), None, Some(discarded)]),
            (started, [Some(started), None, Some(taken), Some(discarded)]),
            (kept, [Some(kept), None, Some(taken), Some(discarded)]),
            (taken, [None, None, None, Some(taken)]),
            (discarded, [None, None, None, Some(discarded)]),
        ] {
            for (call, expected) in ["started", "kept", "taken", "discarded"].into_iter().zip(after) {
                let unshard = in_state(from);
                let result = match call {
                    "started" => unshard.start(),
                    "kept" => unshard.keep(7usize),
                    "taken" => unshard.take::<usize>().map(|held| assert_eq!(held, if from == kept { 7 } else { 3 })),
                    _ => {
                        unshard.discard();
                        Ok(())
                    }
                };
                assert_eq!(result.is_ok(), expected.is_some(), "{call} in {from}");
                if let Err(error) = result {
                    let message = format!("`unshard of layer 4` cannot be {call}: it is {from}");
                    assert!(error.to_string().contains(&message), "{error}");
                }
                assert_eq!(unshard.state.lock().name(), expected.unwrap_or(from), "{call} in {from}");
            }
        }
    }

    #[test]
    fn a_failed_start_is_discarded() {
        let unshard = planned(|_| Err(FsepError::Device("broken".into())));
        assert_eq!(unshard.start(), Err(FsepError::Device("broken".into())));
        assert_eq!(unshard.state.lock().name(), "discarded");
    }

    #[test]
    fn what_another_backend_started_is_refused() {
        let error = in_state("started").take::<String>().unwrap_err();
        assert!(matches!(&error, FsepError::Backend { reason, .. } if reason.contains("another backend")), "{error}");
    }
}
