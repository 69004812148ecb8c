//! The order of assignments by expert, found on the device: a counting sort in which each cube has a tile of assignments and each
//! unit some of the experts. It is stable without atomics, and no number of it depends on what ran first.

use burn::{
    backend::cubecl::dtype_to_elem_type,
    tensor::{DType, Shape},
};
use burn_cubecl::{
    cubecl::{self, ir::ElemType, prelude::*},
    kernel::into_contiguous,
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};

/// Assignments of a cube: what it reads once into shared memory.
const TILE: usize = 1024;

/// [`fsep_sort_assignments`](super::super::FsepDeviceOps::fsep_sort_assignments): `row_of`, `assignment_of`, `token_of` and `ends`.
pub(super) fn sort_assignments(experts: CubeTensor, num_experts: usize, topk: usize) -> [CubeTensor; 4] {
    let experts = into_contiguous(experts);
    let (client, device, dtype) = (experts.client.clone(), experts.device.clone(), experts.dtype);
    let empty = |len: usize, dtype: DType| {
        empty_device_contiguous_dtype(client.clone(), device.clone(), Shape::new([len]), dtype)
    };
    let assignments = experts.meta.num_elements();
    let groups = num_experts + 2;
    let outputs = [assignments, assignments, assignments, groups].map(|len| empty(len, dtype));
    let [row_of, assignment_of, token_of, ends] = &outputs;
    let tiles = assignments.div_ceil(TILE);
    // Without assignments there is nothing to count, but ends are wanted: an empty tile.
    let counts = empty(tiles.max(1) * groups, DType::U32);
    let units = groups.next_multiple_of(32).min(256);
    let dim = CubeDim::new_1d(units as u32);
    let per_tile = CubeCount::Static(tiles as u32, 1, 1);
    let elem = dtype_to_elem_type(dtype);
    if tiles > 0 {
        count_tiles::launch(
            &client,
            per_tile.clone(),
            dim,
            experts.clone().into_tensor_arg(),
            counts.clone().into_tensor_arg(),
            num_experts as u32,
            TILE,
            elem,
        );
    }
    let one = CubeCount::Static(1, 1, 1);
    let (counts_arg, ends_arg) = (counts.clone().into_tensor_arg(), ends.clone().into_tensor_arg());
    let each = groups.div_ceil(units) as u32;
    scan_tiles::launch(&client, one, dim, counts_arg, ends_arg, tiles as u32, each, units, elem);
    if tiles > 0 {
        place_tiles::launch(
            &client,
            per_tile,
            dim,
            experts.into_tensor_arg(),
            counts.into_tensor_arg(),
            row_of.clone().into_tensor_arg(),
            assignment_of.clone().into_tensor_arg(),
            token_of.clone().into_tensor_arg(),
            num_experts as u32,
            topk as u32,
            TILE,
            elem,
        );
    }
    outputs
}

/// The expert, `E` for none, `E + 1` for what is neither.
#[cube]
fn group_of<I: Int>(expert: I, num_experts: u32) -> u32 {
    let mut group = num_experts + 1;
    if expert >= I::new(0) && expert <= I::cast_from(num_experts) {
        group = u32::cast_from(expert);
    }
    group
}

/// Reads the cube's tile of assignments; returns how many there are.
#[cube]
fn load_tile<I: Int>(
    experts: &Tensor<I>,
    groups: &mut Shared<[u32]>,
    num_experts: u32,
    #[comptime] tile: usize,
) -> usize {
    let start = CUBE_POS_X as usize * tile;
    let mut len = experts.len() - start;
    if len > tile {
        len = tile.runtime();
    }
    let mut i = UNIT_POS_X as usize;
    while i < len {
        groups[i] = group_of::<I>(experts[start + i], num_experts);
        i += CUBE_DIM_X as usize;
    }
    sync_cube();
    len
}

/// How many of each tile's assignments each group has. `[T * K] -> [tiles, E + 2]`
#[cube(launch)]
fn count_tiles<I: Int>(
    experts: &Tensor<I>,
    counts: &mut Tensor<u32>,
    num_experts: u32,
    #[comptime] tile: usize,
    #[define(I)] _dtype: ElemType,
) {
    let mut groups = Shared::<[u32]>::new_slice(tile);
    let len = load_tile::<I>(experts, &mut groups, num_experts, tile);
    let num_groups = num_experts as usize + 2;
    let mut group = UNIT_POS_X as usize;
    while group < num_groups {
        let mut count = 0u32;
        for i in 0..len {
            if groups[i] == group as u32 {
                count += 1;
            }
        }
        counts[CUBE_POS_X as usize * num_groups + group] = count;
        group += CUBE_DIM_X as usize;
    }
}

/// Counts of tiles become the first row of each group's assignments in each tile. One cube, of whose units each has `each` groups in
/// a row: shared memory has a number of each unit, so there may be any number of groups. `[tiles, E + 2] -> [E + 2]`
#[cube(launch)]
fn scan_tiles<I: Int>(
    counts: &mut Tensor<u32>,
    ends: &mut Tensor<I>,
    tiles: u32,
    each: u32,
    #[comptime] units: usize,
    #[define(I)] _dtype: ElemType,
) {
    let mut totals = Shared::<[u32]>::new_slice(units);
    let num_groups = ends.len();
    let unit = UNIT_POS_X as usize;
    let first = unit * each as usize;
    let mut end = first + each as usize;
    if end > num_groups {
        end = num_groups;
    }
    let mut total = 0u32;
    for group in first..end {
        for tile in 0..tiles as usize {
            total += counts[tile * num_groups + group];
        }
    }
    totals[unit] = total;
    sync_cube();
    let mut row = 0u32;
    for before in 0..unit {
        row += totals[before];
    }
    for group in first..end {
        for tile in 0..tiles as usize {
            let place = tile * num_groups + group;
            let count = counts[place];
            counts[place] = row;
            row += count;
        }
        ends[group] = I::cast_from(row);
    }
}

/// Where each assignment goes. `([T * K], [tiles, E + 2]) -> 3 of [T * K]`
#[cube(launch)]
fn place_tiles<I: Int>(
    experts: &Tensor<I>,
    starts: &Tensor<u32>,
    row_of: &mut Tensor<I>,
    assignment_of: &mut Tensor<I>,
    token_of: &mut Tensor<I>,
    num_experts: u32,
    topk: u32,
    #[comptime] tile: usize,
    #[define(I)] _dtype: ElemType,
) {
    let mut groups = Shared::<[u32]>::new_slice(tile);
    let len = load_tile::<I>(experts, &mut groups, num_experts, tile);
    let num_groups = num_experts as usize + 2;
    let mut group = UNIT_POS_X as usize;
    while group < num_groups {
        let mut row = starts[CUBE_POS_X as usize * num_groups + group];
        for i in 0..len {
            if groups[i] == group as u32 {
                let assignment = CUBE_POS_X * tile as u32 + i as u32;
                row_of[assignment as usize] = I::cast_from(row);
                assignment_of[row as usize] = I::cast_from(assignment);
                token_of[row as usize] = I::cast_from(assignment / topk);
                row += 1;
            }
        }
        group += CUBE_DIM_X as usize;
    }
}
