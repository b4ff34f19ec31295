"""Faults of row attention for ``cuda_mutants.py``."""

from __future__ import annotations

from cuda_planted import of_file

#: what a block's rows see, in whatever kernel of rows
SEEN = of_file(
    "rows.cuh",
    a_step_inside_has_a_key_of_the_future=(
        "min(lowest, end - 1) - (KEYS - 1)",
        "min(lowest, end - 1) - (KEYS - 2)",
    ),
    a_step_inside_begins_before_the_window=(
        "clamped(highest - p.window, 0, LAST)",
        "clamped(highest - p.window - 1, 0, LAST)",
    ),
    blocks_begin_with_the_window_of_their_last_row=(
        "clamped(lowest - p.window",
        "clamped(highest - p.window",
    ),
    blocks_end_before_their_last_row=("min(highest + 1, keys)", "min(highest, keys)"),
    positions_begin_at_zero=("p.key_pos ? 0 : p.first_pos", "0"),
    parts_overlap=("min(part * each, steps_all)", "min(part * (each - 1), steps_all)"),
)
ROW_ATTENTION = {
    **SEEN,
    **of_file(
        "row_attention.cuh",
        queries_are_not_waited_for=(
            "copy_wait<0>();\n  __syncthreads();\n  const int warp_row",
            "copy_wait<1>();\n  __syncthreads();\n  const int warp_row",
        ),
        no_barrier_before_the_queries=(
            "copy_wait<0>();\n  __syncthreads();\n  const int warp_row",
            "copy_wait<0>();\n  const int warp_row",
        ),
        queries_are_overwritten_by_keys=("__syncthreads();  // before the stages are filled", ""),
        a_step_is_not_waited_for=("copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();"),
        no_barrier_before_a_step=(
            "__syncthreads();  // this step's keys are there",
            "// this step's keys are there",
        ),
        one_stage_for_all_steps=("step % STAGES * 2", "step % (STAGES - 1) * 2"),
        slots_of_the_step_before=(
            "if (step + 1 < view.steps) look_up(step + 1);",
            "look_up(step);",
        ),
        values_in_the_place_of_keys=(
            "stager.copy(p.v, to + KEYS * D, head);",
            "stager.copy(p.v, to, head);",
        ),
        wrong_address_of_a_query=(
            "of_rows(lane % 16, lane / 16)",
            "of_rows(lane % 16, lane % 2)",
        ),
        wrong_address_of_a_key=(
            "of_keys(lane / 16 * 8 + lane % 8, lane / 8 % 2)",
            "of_keys(lane % 16, lane / 16)",
        ),
        values_are_not_turned=("load_matrices_turned(b", "load_matrices(b"),
        probabilities_change_places=(
            "s[m][2 * n + i / 2] + i % 2 * 2",
            "s[m][2 * n + i % 2] + i / 2 * 2",
        ),
        keys_for_values=("stager.copy(p.v, to + KEYS", "stager.copy(p.k, to + KEYS"),
        no_bound_on_rows=("if (r >= count) continue;", ""),
        a_warp_without_rows_ends=("if (idle) continue;", "if (idle) return;"),
        rows_see_what_the_last_of_their_tile_sees=(
            "r < count ? pos[r / p.group] - view.origin : 0",
            "view.highest",
        ),
        a_row_does_not_see_its_own_place=("at <= high[half]", "at < high[half]"),
        the_window_is_one_too_short=("clamped(at - p.window,", "clamped(at - p.window + 1,"),
        listed_positions_are_not_read=("if (view.listed) at =", "if (false) at ="),
        listed_positions_of_another_request=("p.key_pos[first_key + at]", "p.key_pos[at]"),
        no_soft_cap=("if (p.cap_log2 > 0.0f) {", "if (false) {"),
        sums_are_not_rescaled=("total[half] * shrink[half] + (sum", "total[half] + (sum"),
        outputs_are_not_rescaled=(
            "[half % 2 * 2 + 1] *= shrink[half];",
            "[half % 2 * 2 + 1] *= 1.0f;",
        ),
        a_row_without_keys_divides_by_zero=(
            "base[half] = all == NEVER ? 0.0f : all;",
            "base[half] = all;",
        ),
        peaks_of_two_of_four_lanes=("all = fmaxf(all, __shfl_xor_sync(WARP_MASK, all, 2));", ""),
        two_of_four_lanes_are_summed=(
            "total[half] += __shfl_xor_sync(WARP_MASK, total[half], 2);",
            "",
        ),
        shuffle_of_half_the_lanes=(
            "total[half] += __shfl_xor_sync(WARP_MASK, total[half], 1);",
            "if (t < 2) total[half] += __shfl_xor_sync(WARP_MASK, total[half], 1);",
        ),
        queries_of_another_head=(
            "(head * p.group + r % p.group) * p.q_head",
            "r % p.group * p.q_head",
        ),
        outputs_of_another_head=(
            "p.heads + head * p.group + r % p.group;",
            "p.heads + r % p.group;",
        ),
        queries_of_another_request=("(first_row + r / p.group) * p.q_row", "r / p.group * p.q_row"),
        keys_of_another_request=(
            "first_key + view.begin + int64_t(step) * KEYS, first_key + view.end",
            "view.begin + int64_t(step) * KEYS, view.end",
        ),
        a_shrink_of_one_row_is_missed=(
            "shrinks |= shrink[half] != 1.0f",
            "shrinks = shrink[half] != 1.0f",
        ),
        the_other_half_of_a_tile_again=("blockIdx.x % HALVES * ROWS", "0"),
        sinks_of_another_head=(
            "p.sinks + cell % p.heads : nullptr;",
            "p.sinks + cell % p.group : nullptr;",
        ),
        log_sum_exp_in_base_two=("p.lse[at] = done.lse * LN_2", "p.lse[at] = done.lse"),
    ),
    **of_file(
        "rows.cuh",
        listed_positions_begin_with_the_window=("listed || !windowed ? 0 :", "!windowed ? 0 :"),
        listed_positions_end_with_the_last_row=(
            "const int last = listed ? keys :",
            "const int last =",
        ),
        of_listed_positions_some_steps_are_seen_whole=(
            "listed ? -1 : min(lowest",
            "min(lowest",
        ),
        sinks_are_scaled=("*sink * LOG2_E", "*sink"),
        parts_weigh_alike=("const float weight = power2(lse - top)", "const float weight = 1.0f"),
        the_last_part_is_left_out=(
            "for (int i = 0; i < p.parts; ++i) {",
            "for (int i = 0; i < p.parts - 1; ++i) {",
        ),
        what_saw_no_key_is_read=("if (lse == NEVER) continue;", ""),
    ),
    **of_file(
        "attention.h",
        scale_zero_has_no_cap=("if (score == 0) cap = std::max(cap, 1.0f);", ""),
    ),
    **of_file(
        "tile.cuh",
        pieces_lie_where_they_are_not_looked_for=(
            "copy16_async(to + place<D>(row, piece), from, there);",
            "copy16_async(to + row * D + 8 * piece, from, there);",
        ),
        no_bound_on_keys=("P::within(row) && token < end", "P::within(row)"),
        misaligned_vector=("(within ? 16 * piece : 0)", "(within ? 16 * piece + 2 : 0)"),
        fp8_pieces_change_places=(
            "low[i] = x[i], high[i] = x[8 + i]",
            "high[i] = x[i], low[i] = x[8 + i]",
        ),
        every_fp8_is_e4m3=("if (p.type == KeyType::E4M3)", "if (true)"),
    ),
}
