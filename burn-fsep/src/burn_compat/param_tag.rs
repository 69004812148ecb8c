use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

use burn::module::ParamId;

/// A new id for a parameter, with a tag that [`param_tag`] finds in it.
///
/// Relied on: an id is any 64 bits, of which nobody but us interprets any; records keep it, and a parameter into which a record
/// is loaded has the record's. It is all that they keep of a parameter besides name and value.
///
/// Half of it is the tag: an id that was made elsewhere, with random bits, has a given tag once in four billion. The other
/// half counts on from a random number, so that ids of one process are never equal and those of two hardly ever.
pub(crate) fn tagged_param(tag: u32) -> ParamId {
    static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| AtomicU32::new(ParamId::new().val() as u32));
    ParamId::from(u64::from(NEXT.fetch_add(1, Ordering::Relaxed)) << 32 | u64::from(tag))
}

/// The tag that an id was made with; random if it was made without one.
pub(crate) fn param_tag(id: ParamId) -> u32 {
    id.val() as u32
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::collections::HashSet;

    use burn::{
        module::{Module, Param},
        nn::{Linear, LinearConfig},
        store::ModuleRecord,
        tensor::{Device, Tensor},
    };

    use super::*;

    #[test]
    fn records_carry_tags() {
        let device = Device::flex().autodiff();
        let linear = || LinearConfig::new(2, 2).with_bias(false).init(&device);
        let mut saved: Linear = linear();
        saved.weight.id = tagged_param(42);
        let bytes = saved.clone().into_record().into_bytes().unwrap();
        let loaded = linear().load_record(ModuleRecord::from_bytes(bytes).unwrap());
        assert_eq!((param_tag(loaded.weight.id), loaded.weight.id), (42, saved.weight.id));
        // Whatever else happens to the module.
        let moved = loaded.clone().map(&mut Identity).fork(&device).valid().train();
        assert_eq!(moved.weight.id, saved.weight.id);
    }

    struct Identity;

    impl burn::module::ModuleMapper for Identity {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| tensor)
        }
    }

    #[test]
    fn ids_are_unique_whatever_their_tag() {
        let ids: HashSet<_> = (0..1000).map(|i| tagged_param(i % 2)).collect();
        assert_eq!(ids.len(), 1000);
    }
}
