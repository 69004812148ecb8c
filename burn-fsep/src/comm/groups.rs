use std::sync::Arc;

use super::{CommError, Communicator};

/// stub
#[derive(Debug, Clone)]
pub struct Groups {
    world: Arc<dyn Communicator>,
    experts: Arc<dyn Communicator>,
    replicas: Arc<dyn Communicator>,
}

impl Groups {
    /// stub
    pub fn new(world: Arc<dyn Communicator>, _ranks: usize) -> Result<Self, CommError> {
        let replicas = Arc::new(super::local::LocalCommunicator::single());
        Ok(Self { experts: world.clone(), world, replicas })
    }
    /// stub
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }
    /// stub
    pub fn experts(&self) -> &Arc<dyn Communicator> {
        &self.experts
    }
    /// stub
    pub fn replicas(&self) -> &Arc<dyn Communicator> {
        &self.replicas
    }
}
