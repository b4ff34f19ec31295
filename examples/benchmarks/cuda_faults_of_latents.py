"""Faults of attention over a latent cache for ``cuda_mutants.py``."""

from __future__ import annotations

from cuda_faults_of_rows import SEEN
from cuda_planted import of_file

LATENT_ATTENTION = SEEN | of_file(
    "latent_attention.cuh",
    a_step_is_not_waited_for=(
        "copy_wait<0>();\n    __syncthreads();  // this step's",
        "__syncthreads();  // this step's",
    ),
    no_barrier_before_a_step=(
        "__syncthreads();  // this step's keys are there",
        "// this step's keys are there",
    ),
    no_barrier_behind_the_only_stage=("__syncthreads();  // all are done with the keys", "//"),
    one_stage_for_all_steps=("step % STAGES * KEYS", "step % 1 * KEYS"),
    no_barrier_behind_peaks=(
        "__syncthreads();  // the warps that share",
        "// the warps that share",
    ),
    no_barrier_behind_weights=("__syncthreads();  // all weights are there", "//"),
    no_barrier_before_sums_take_the_place_of_peaks=("__syncthreads();  // all have read", "//"),
    slots_of_the_step_before=("if (step + 1 < view.steps) look_up(step + 1);", "look_up(step);"),
    no_bound_on_keys=("slot[i] = token < end ?", "slot[i] = true ?"),
    no_bound_on_columns=(
        "const int dim = slot[i] < 0 ? 0 : p.dim;",
        "const int dim = slot[i] < 0 ? 0 : LATENT_KEY;",
    ),
    no_bound_on_the_columns_of_a_query=("r < count && column < p.dim;", "r < count;"),
    columns_of_keys_lie_where_they_are_not_looked_for=(
        "T* const mine = to + place<LATENT_KEY>(row, piece);",
        "T* const mine = to + row * LATENT_KEY + 8 * piece;",
    ),
    fp8_of_another_column=("load8_once(from + column)", "load8_once(from + 2 * column % 512)"),
    every_fp8_is_e4m3=("if (type == KeyType::E4M3)", "if (true)"),
    wrong_address_of_a_query=("of_rows(lane % 16, lane / 16)", "of_rows(lane % 16, lane % 2)"),
    wrong_address_of_a_key=(
        "of_keys(lane / 16 * 8 + lane % 8, lane / 8 % 2)",
        "of_keys(lane % 16, lane / 16)",
    ),
    wrong_address_of_a_weight=("of_weights(lane % 16, lane / 16)", "of_weights(lane % 16, 0)"),
    values_are_not_turned=("load_matrices_turned(b", "load_matrices(b"),
    every_warp_has_the_first_warps_keys=("(share * OWN + n * 16) * KEY", "n * 16 * KEY"),
    every_warp_has_the_first_warps_columns=("KEY + warp * COLUMNS + of_rows", "KEY + of_rows"),
    weights_in_the_place_of_others=("share * (OWN / 8) + n) + 2 * t", "n) + 2 * t"),
    peaks_of_one_warp=("fmaxf(all, peaks[i * ROWS + row])", "fmaxf(all, peaks[row])"),
    sums_of_one_warp=("all += peaks[i * ROWS + row];", "all = peaks[row];"),
    peaks_of_two_of_four_lanes=("peak = fmaxf(peak, __shfl_xor_sync(WARP_MASK, peak, 2));", ""),
    two_of_four_lanes_are_summed=(
        "total[half] += __shfl_xor_sync(WARP_MASK, total[half], 2);",
        "",
    ),
    sums_are_not_rescaled=("total[half] * shrink + sum", "total[half] + sum"),
    outputs_are_not_rescaled=("[half % 2 * 2 + 1] *= shrink;", "[half % 2 * 2 + 1] *= 1.0f;"),
    a_shrink_of_the_last_row_is_missed=(
        "some |= shrinks[i + lane] != 1.0f",
        "some |= shrinks[i + lane / 2] != 1.0f",
    ),
    a_row_without_keys_divides_by_zero=(
        "const float base = all == NEVER ? 0.0f : all,",
        "const float base = all,",
    ),
    no_bound_on_rows=("if (r >= count) continue;", ""),
    rows_see_what_the_last_of_their_block_sees=(
        "r < count ? pos[r / p.heads] - view.origin : 0",
        "view.highest",
    ),
    a_row_does_not_see_its_own_place=("at <= high[half]", "at < high[half]"),
    the_window_is_one_too_short=("clamped(at - p.window,", "clamped(at - p.window + 1,"),
    listed_positions_are_not_read=("if (view.listed) at =", "if (false) at ="),
    no_soft_cap=("if (p.cap_log2 > 0.0f) {", "if (false) {"),
    queries_of_another_request=("(first_row + r / p.heads) * p.q_row", "r / p.heads * p.q_row"),
    queries_of_another_head=("r % p.heads * p.q_head;", "first % p.heads * p.q_head;"),
    keys_of_another_request=(
        "first_key + view.begin + int64_t(step) * KEYS, first_key + view.end",
        "view.begin + int64_t(step) * KEYS, view.end",
    ),
    the_first_rows_of_a_tile_again=("tile.begin + blockIdx.x * ROWS", "tile.begin"),
    sinks_of_the_first_head=("p.sinks + cell % p.heads : nullptr;", "p.sinks : nullptr;"),
    log_sum_exp_in_base_two=("p.lse[at] = done.lse * LN_2", "p.lse[at] = done.lse"),
    columns_beyond_the_values=("if (column >= p.v.dim) continue;", ""),
)
