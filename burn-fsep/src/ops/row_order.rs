//! Where the assignments of a rank go, and which rows their tokens take on the way if each goes once to a rank: on any
//! backend, by Burn's operations on integers.

use burn::{
    backend::{
        Backend, TensorMetadata, get_device_settings,
        tensor::{BoolTensor, Device, IntTensor},
    },
    tensor::{BoolDType, IntDType, Shape},
};

use super::{FsepDeviceOps, assignment_order::with_dtype};

/// Assignments of one rank to one expert that go to one rank: a run of the assignments sorted by expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AssignmentRun {
    /// The rank that computes them.
    pub rank: usize,
    /// How many they are.
    pub len: usize,
    /// What to add to an assignment's row here to get its row among that rank's slot rows.
    pub shift: i64,
}

/// Where each assignment of a rank goes. Shape `[T * K]` each
#[derive(Debug, Clone)]
pub struct AssignmentPlaces<I> {
    /// The rank that computes it.
    pub rank_of: I,
    /// Its row among that rank's slot rows.
    pub place_of: I,
    /// The first assignment of its token to the same rank.
    pub first_of: I,
}

/// Numbers, each repeated so many times, of the type and on the device of `like`.
pub(super) fn repeated<B: Backend>(numbers: &[i64], times: &[usize], like: &IntTensor<B>) -> IntTensor<B> {
    let values: Vec<i64> =
        numbers.iter().zip(times).flat_map(|(&number, &times)| std::iter::repeat_n(number, times)).collect();
    B::int_from_data(with_dtype(values, like.dtype()), &like.device())
}

/// Where assignments go; and the rank of each that is the first of its token to it, `num_ranks` for the others. `row_of`,
/// `[T * K]`, with at least one token, and for each row its rank and what to add to get its place, `[T * K]` each.
pub(super) fn place_assignments<B: Backend>(
    row_of: IntTensor<B>,
    [ranks, shifts]: [IntTensor<B>; 2],
    num_ranks: usize,
    topk: usize,
) -> (AssignmentPlaces<IntTensor<B>>, IntTensor<B>) {
    let (len, bools) = (row_of.shape()[0], bool_dtype::<B>(&row_of.device()));
    let tokens = len / topk;
    let rank_of = B::int_select(ranks, 0, row_of.clone());
    let place_of = B::int_add(B::int_select(shifts, 0, row_of.clone()), row_of);

    let cube = Shape::new([tokens, topk, topk]);
    let expand = |dims: [usize; 3]| {
        let tensor = B::int_reshape(rank_of.clone(), Shape::new(dims));
        B::int_expand(tensor, cube.clone())
    };
    let differs = B::int_not_equal(expand([tokens, topk, 1]), expand([tokens, 1, topk]), bools);
    let choices = B::int_reshape(arange::<B>(topk, &rank_of), Shape::new([1, 1, topk]));
    let candidates = B::int_mask_fill(B::int_expand(choices, cube), differs, (topk as i64).into());
    let first = B::int_reshape(B::int_min_dim(candidates, 2), Shape::new([len]));
    let begin = B::int_mul_scalar(by_token::<B>(tokens, topk, &rank_of), (topk as i64).into());
    let first_of = B::int_add(first, begin);

    let follows = B::int_not_equal(first_of.clone(), arange::<B>(len, &rank_of), bools);
    let leading = B::int_mask_fill(rank_of.clone(), follows, (num_ranks as i64).into());
    (AssignmentPlaces { rank_of, place_of, first_of }, leading)
}

/// First assignments of a token to a rank, sorted by rank.
#[derive(Debug, Clone)]
pub struct LeadingOrder<I> {
    /// `[T * K]`
    pub row_of: I,
    /// The token of each. `[T * K]`
    pub token_of: I,
    /// Where those of each rank end. `[N + 2]`
    pub ends: I,
}

/// Rows of tokens, `lens[r]` for each rank `r`, at least as many as lead there; `ranks`, `[U]`, is the rank of each row.
///
/// - `row_of`, `[T * K]`: the row of each assignment's token for its rank; `-1 - row` unless it is the first of them
/// - `token_of`, `[U]`: the token of each row; any for rows that none needs
/// - `places`, `[U * K]`: the place of each of the token's assignments, -1 where another rank computes it
pub(super) fn lay_out_rows<B: FsepDeviceOps>(
    assignments: AssignmentPlaces<IntTensor<B>>,
    order: LeadingOrder<IntTensor<B>>,
    ranks: IntTensor<B>,
    lens: &[usize],
    topk: usize,
) -> [IntTensor<B>; 3] {
    let AssignmentPlaces { rank_of, place_of, first_of } = assignments;
    let (len, rows, bools) = (rank_of.shape()[0], ranks.shape()[0], bool_dtype::<B>(&rank_of.device()));
    let part = |tensor: &IntTensor<B>, range: std::ops::Range<usize>| B::int_slice(tensor.clone(), &[range.into()]);

    // A rank's rows begin at `starts` here, and at `begins` among the sorted assignments.
    let starts = lens.iter().scan(0, |start, len| Some(std::mem::replace(start, *start + *len as i64))).collect();
    let ends = part(&order.ends, 0..lens.len());
    let upload = |numbers: Vec<i64>| {
        let once = vec![1; numbers.len()];
        B::fsep_repeated(numbers, once, rank_of.clone())
    };
    let zero = upload(vec![0]);
    let begins = B::int_cat(vec![zero, part(&order.ends, 0..lens.len() - 1)], 0);
    let shifts = B::int_sub(begins, upload(starts));

    let sorted = B::int_add(arange::<B>(rows, &rank_of), B::int_select(shifts.clone(), 0, ranks.clone()));
    let is_spare = B::int_greater_equal(sorted.clone(), B::int_select(ends, 0, ranks.clone()), bools);
    let sorted = B::int_mask_fill(sorted, is_spare.clone(), 0.into());
    let token_of = B::int_select(order.token_of, 0, sorted);

    let square = Shape::new([rows, topk]);
    let of_rows = |tensor: &IntTensor<B>| {
        B::int_select(B::int_reshape(tensor.clone(), Shape::new([len / topk, topk])), 0, token_of.clone())
    };
    let ranks = B::int_expand(B::int_reshape(ranks, Shape::new([rows, 1])), square.clone());
    let is_elsewhere = B::int_not_equal(of_rows(&rank_of), ranks, bools);
    let is_spare: BoolTensor<B> = B::bool_expand(B::bool_reshape(is_spare, Shape::new([rows, 1])), square);
    let places = B::int_mask_fill(of_rows(&place_of), is_elsewhere, (-1i64).into());
    let places = B::int_mask_fill(places, is_spare, (-1i64).into());
    let places = B::int_reshape(places, Shape::new([rows * topk]));

    let row = B::int_select(order.row_of, 0, first_of.clone());
    let row = B::int_sub(row, B::int_select(shifts, 0, rank_of));
    let follows = B::int_not_equal(first_of, arange::<B>(len, &row), bools);
    let other = B::int_sub_scalar(B::int_neg(row.clone()), 1.into());
    [B::int_mask_where(row, follows, other), token_of, places]
}

/// The type of truth values on a device.
pub(super) fn bool_dtype<B: Backend>(device: &Device<B>) -> BoolDType {
    get_device_settings::<B>(device).bool_dtype
}

/// `0..len`, of the type and on the device of `like`.
pub(super) fn arange<B: Backend>(len: usize, like: &IntTensor<B>) -> IntTensor<B> {
    B::int_arange(0..len as i64, &like.device(), int_dtype::<B>(like))
}

/// The token of each assignment. `[T * K]`
fn by_token<B: Backend>(tokens: usize, topk: usize, like: &IntTensor<B>) -> IntTensor<B> {
    let tokens_of = B::int_reshape(arange::<B>(tokens, like), Shape::new([tokens, 1]));
    B::int_reshape(B::int_expand(tokens_of, Shape::new([tokens, topk])), Shape::new([tokens * topk]))
}

fn int_dtype<B: Backend>(tensor: &IntTensor<B>) -> IntDType {
    tensor.dtype().into()
}
