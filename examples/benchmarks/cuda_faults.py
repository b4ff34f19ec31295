"""Faults for ``cuda_mutants.py``: in which file of ``csrc/cuda`` what becomes what."""

from __future__ import annotations

from typing import NamedTuple


class Planted(NamedTuple):
    file: str
    old: str
    new: str


def _of(file: str, **faults: tuple[str, str]) -> dict[str, Planted]:
    return {name.replace("_", " "): Planted(file, *change) for name, change in faults.items()}


ROTATE_SCATTER = {
    **_of(
        "rotate_scatter.cuh",
        tokens_that_run_are_overwritten=("if (at.stays) continue;", ""),
        no_bound_on_tokens=("i < n; i += gridDim", "i < n + 1; i += gridDim"),
        a_small_grid_leaves_tokens_out=("i += gridDim.x * blockDim.y", "i += n"),
        angles_of_another_token=("int64_t(i) * half, at.group", "int64_t(i / 2) * half, at.group"),
        a_token_without_group_gets_the_first=(
            "group = BIASED ? bias.group[i] : -1",
            "group = BIASED ? max(bias.group[i], 0) : -1",
        ),
        the_bias_is_not_turned=("turn<HALVES>(a, b, a_cos, a_sin);", ""),
        V_gets_no_bias=(
            "if (BIASED && group >= 0) {\n      float x[N];",
            "if (BIASED && key && group >= 0) {\n      float x[N];",
        ),
        steps_of_V_for_K=("src.places[2 * int64_t(n) + i]", "src.places[3 * int64_t(n) + i]"),
        the_layer_is_ignored=(
            "src.layer * src.places[3 * int64_t(n) + i]",
            "src.places[3 * int64_t(n) + i]",
        ),
        the_unturned_rest_is_left_out=(
            "rest = (h.dim - h.rotary_dim) / N, of_rest",
            "rest = (h.dim - h.rotary_dim) / N / 2, of_rest",
        ),
        V_in_the_stride_of_K=("at.to * dst.v_stride", "at.to * dst.k_stride"),
        what_is_beside_the_turned_ends_with_it=("u < pairs || p < others", "u < pairs"),
        every_second_of_the_others=("p += PLAIN * blockDim.x", "p += 2 * PLAIN * blockDim.x"),
    ),
    **_of(
        "rotation.cuh",
        misaligned_vector=("HALVES ? N * part :", "HALVES ? N * part + (part == 1) :"),
        turned_the_other_way=(
            "a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));",
            "a = __fadd_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));",
        ),
        products_contracted_into_sums=(
            "a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));",
            "a = fmaf(x, cos, -__fmul_rn(y, sin));",
        ),
        pairs_take_the_angles_before=("sin[N / 2 + i]", "sin[i]"),
    ),
    **_of(
        "elements.cuh",
        fp8_does_not_saturate=("__NV_SATFINITE", "__NV_NOSAT"),
        two_floats_change_places=(
            "pair.x = x[2 * i], pair.y = x[2 * i + 1]",
            "pair.y = x[2 * i], pair.x = x[2 * i + 1]",
        ),
    ),
}

DELTAS = {
    **_of(
        "deltas.cuh",
        tokens_of_the_next_document=("p.bounds[blockIdx.y + 1];", "p.bounds[blockIdx.y + 1] + 1;"),
        a_document_begins_one_late=(
            "i = p.bounds[blockIdx.y] + threadIdx.y",
            "i = p.bounds[blockIdx.y] + threadIdx.y + 1",
        ),
        the_first_step_alone=("i += DELTA_ROWS) {", "i += p.bounds[blockIdx.y + 1]) {"),
        cached_K_is_not_turned=("p.old.cos + angle, p.old.sin + angle", "p.fresh.cos, p.fresh.sin"),
        angles_of_another_token=("angle = i * half + N * part", "angle = i / 2 * half + N * part"),
        beside_is_not_looked_at=("old_slot < 0 ? p.beside : p.old.kept", "p.old.kept"),
        V_in_the_stride_of_K=(
            "cached.v + from * cached.v_stride",
            "cached.v + from * cached.k_stride",
        ),
        no_barrier_before_the_sums=("  __syncthreads();\n", ""),
        the_last_row_is_left_out=("row < DELTA_ROWS; ++row", "row < DELTA_ROWS - 1; ++row"),
        not_scaled=("sum *= p.scale[blockIdx.y];", ""),
        the_second_half_in_the_place_of_the_first=(
            "place.second + j - N",
            "place.first + j - N",
        ),
        the_unturned_rest_is_left_out=(
            "(p.dim - 2 * half) / N;",
            "(p.dim - 2 * half) / N / 2;",
        ),
    ),
}

SELECT = {
    **_of(
        "select.cuh",
        no_barrier_before_counts_of_other_warps=(
            "s.counts[half][warp] = mine;\n    __syncthreads();",
            "s.counts[half][warp] = mine;",
        ),
        one_half_for_all_rounds=("const int half = bit % 2;", "const int half = 0;"),
        no_barrier_before_ranks_of_other_warps=(
            "s.equal[warp] = equal;\n  __syncthreads();",
            "s.equal[warp] = equal;",
        ),
        one_less_than_wanted=("if (all >= k) bound", "if (all > k) bound"),
        the_lowest_bit_is_not_looked_at=("bit >= 0 && k > 0", "bit > 0 && k > 0"),
        one_tie_too_many=("equal_before < wanted)", "equal_before <= wanted)"),
        ties_beyond_the_wanted_are_counted=("min(equal_before, wanted)", "equal_before"),
        NaN_is_a_large_number=(
            "if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;",
            "",
        ),
        minus_zero_is_below_zero=("if ((bits & 0x7fffffffu) == 0) return 0x80000000u;", ""),
        scores_beyond_the_registers_are_not_counted=(
            "for (int64_t j = KEYS; j < rounds; ++j) out",
            "for (int64_t j = KEYS; j < 0; ++j) out",
        ),
        scores_beyond_the_registers_are_not_written=(
            "for (int64_t j = KEYS; j < rounds; ++j) body",
            "for (int64_t j = KEYS; j < 0; ++j) body",
        ),
        lanes_without_a_score_do_not_come=(
            "if (j < rounds) body(j, key[j]);",
            "if (j < rounds && index(j) < n) body(j, key[j]);",
        ),
        a_warp_counts_itself_before_it=(
            "lane < warp ? s.above[lane] : 0",
            "lane <= warp ? s.above[lane] : 0",
        ),
        ends_before_the_last_score=("if (i >= n) return;", "if (i >= n - 1) return;"),
        rest_begins_at_the_segment=(
            "p.rest[first - chosen_before + i - rank]",
            "p.rest[first + i - rank]",
        ),
    ),
    **_of(
        "deviation.cuh",
        half_a_warp_is_summed=(
            "for (int by = 16; by > 0; by /= 2)",
            "for (int by = 8; by > 0; by /= 2)",
        ),
        lanes_leave_before_the_sum=(
            "#pragma unroll\n  for (int by = 16;",
            "if (threadIdx.x > 29) return;\n  for (int by = 16;",
        ),
        cached_K_is_not_turned=("turn<HALVES>(x, y, cos, sin);", ""),
        the_second_half_is_left_out=(", add_apart(sum, z, y);", ";"),
        K_beyond_the_rotation_is_left_out=(
            "        Apart<T> pair;\n",
            "        continue;\n        Apart<T> pair;\n",
        ),
        one_pair_of_all_in_flight=("pair[j].add(sum)", "pair[0].add(sum)"),
        a_second_round_begins_with_the_first=(
            "pair[j].load(a, b, N * (u + 32 * j))",
            "pair[j].load(a, b, N * (u % (32 * UNITS) + 32 * j))",
        ),
        no_bound_on_pairs=("if (u + 32 * j < of_v) pair[j].add", "pair[j].add"),
    ),
}

ATTENTION_MASS = _of(
    "attention_mass.cuh",
    queries_are_not_waited_for=("copy_wait<MASS_STAGES - 2>();", "copy_wait<MASS_STAGES - 1>();"),
    no_barrier_before_the_queries=("__syncthreads();  // the step's", "// the step's"),
    the_stage_in_use_is_filled=("now == 0 ? MASS_STAGES - 1 : now - 1", "now"),
    two_steps_ahead_are_three=("begin + (MASS_STAGES - 1) *", "begin + MASS_STAGES *"),
    wrong_address_of_a_fragment=("g, 4 * c + t)", "g, 4 * c + (t ^ 1))"),
    pieces_lie_where_they_are_not_looked_for=(
        "to.query + to.place(q, piece)",
        "to.query + q * D + 8 * piece",
    ),
    no_bound_on_queries=("begin + q < count && 8 * piece < p.k.dim", "8 * piece < p.k.dim"),
    no_bound_on_weights=("const bool there = begin + q < count;", "const bool there = true;"),
    no_bound_on_keys=("if (t == 0 && key < p.n)", "if (t == 0)"),
    shuffle_of_half_the_lanes=(
        "sum[i] += __shfl_xor_sync(WARP_MASK, sum[i], 1);",
        "if (t < 2) sum[i] += __shfl_xor_sync(WARP_MASK, sum[i], 1);",
    ),
    two_of_four_lanes_are_summed=("sum[i] += __shfl_xor_sync(WARP_MASK, sum[i], 2);", ""),
    log_sum_exp_of_another_head=("p.heads + head * p.group + of, there", "p.heads + of, there"),
    queries_of_another_head=(
        "static_cast<const T*>(p.q) + head * p.group * p.q_head +",
        "static_cast<const T*>(p.q) +",
    ),
    rows_are_rounded_down=("((1u << 31) + p.group - 1) / p.group", "(1u << 31) / p.group"),
    layers_before_are_forgotten=("p.mass[head * p.n + key] += sum[i];", "p.mass[key] = sum[i];"),
    late_mass_of_another_head=("p.late[head * p.n + key]", "p.late[key]"),
    values_norm_is_not_rooted=("sum[i] * sqrtf(norm[i])", "sum[i] * norm[i]"),
    values_of_another_head=(
        "load_rows<T>(p.v, p.n, a, first, head",
        "load_rows<T>(p.v, p.n, a, first, 0",
    ),
    values_end_with_the_tile=("column < p.v.dim;", "column < 1;"),
    half_of_a_value_is_left_out=(" + (y.x * y.x + y.y * y.y);", ";"),
    row_weights_are_left_out=("sum[i] += weight * power2", "sum[i] += power2"),
    the_window_is_one_too_short=(
        "pos < at - p.window)) continue",
        "pos <= at - p.window)) continue",
    ),
    a_row_does_not_see_its_own_place=("if (pos > at ||", "if (pos >= at ||"),
    a_step_that_sees_all_sees_the_first_key=("(highest > at ||", "(lowest > at ||"),
    a_step_that_sees_all_has_the_last_in_its_window=(
        "lowest < at - p.window));",
        "highest < at - p.window));",
    ),
    no_soft_cap=("const bool capped = p.cap_log2 > 0.0f;", "const bool capped = false;"),
    a_head_that_fills_no_tile_reads_on=(
        "begin + q < count && 8 * piece < p.k.dim",
        "begin + q < count",
    ),
    a_key_that_fills_no_tile_reads_on=("if (column + 32 * c + 8 * t < p.dim) {", "{"),
    keys_change_places=("even[i % 2] = v.x", "even[1 - i % 2] = v.x"),
    every_fp8_is_e4m3=(": Fp8Piece<__NV_E5M2> {}", ": Fp8Piece<__NV_E4M3> {}"),
)

GATHER = _of(
    "gather.cuh",
    no_bound_on_tokens_of_a_chunk=("if (i >= tokens) return;", ""),
    no_bound_on_tokens_that_are_taken=("i < p.count; i += step", "i <= p.count; i += step"),
    a_small_grid_leaves_tokens_out=("i < p.count; i += step", "i < p.count; i += p.count"),
    the_last_tokens_get_no_block=("(most + block.y - 1) / block.y", "most / block.y"),
    the_last_words_are_left_out=("total = words.k + words.v;", "total = words.k + words.v - 1;"),
    one_word_for_all_in_flight=("u - words.k), moved[j]);", "u - words.k), moved[0]);"),
    misaligned_word=("? k_from + 16 * int64_t(u)", "? k_from + 8 * int64_t(u)"),
    V_is_read_behind_K=("v_from + 16 * int64_t(u - words.k)", "v_from + 16 * int64_t(u)"),
    slots_of_the_first_chunk=("p.slots[first + i]", "p.slots[i]"),
    steps_of_V_for_K=(
        "slot * p.layers[2 * p.count + layer]",
        "slot * p.layers[3 * p.count + layer]",
    ),
    V_of_the_first_layer=("p.layers[p.count + layer]", "p.layers[p.count]"),
    every_chunk_at_the_beginning=("p.out + chunk[2] +", "p.out +"),
    layers_without_V=("layer * tokens * (k_bytes + v_bytes)", "layer * tokens * k_bytes"),
    V_beside_its_K=(
        "to + tokens * k_bytes + i * v_bytes",
        "to + i * (k_bytes + v_bytes) + k_bytes",
    ),
    the_index_is_ignored=("p.index ? p.index[i] : i", "i"),
    the_layer_is_ignored=("p.layer * p.places[3 * p.n + from]", "p.places[3 * p.n + from]"),
    layers_of_V_for_K=("p.layer * p.places[2 * p.n + from]", "p.layer * p.places[3 * p.n + from]"),
)

ROW_ATTENTION = {
    **_of(
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
        no_groups_behind_the_last_step=(
            "    copy_commit();  // an empty one too: as many groups in flight",
            "    if (step < steps) copy_commit();",
        ),
        slots_of_the_step_before=("if (step + 1 < steps) look_up(step + 1);", "look_up(step);"),
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
        a_warp_without_rows_ends=(
            "const bool idle = first + warp_row >= count;",
            "const bool idle = first + warp_row >= count;\n  if (idle) return;",
        ),
        rows_see_what_the_last_of_their_tile_sees=(
            "r < count ? pos[r / p.group] - origin : 0",
            "highest",
        ),
        a_row_does_not_see_its_own_place=("at > high[half]", "at >= high[half]"),
        the_window_is_one_too_short=("clamped(at - p.window,", "clamped(at - p.window + 1,"),
        a_step_inside_has_a_key_of_the_future=(
            "min(lowest, end - 1) - (KEYS - 1)",
            "min(lowest, end - 1) - (KEYS - 2)",
        ),
        a_step_inside_begins_before_the_window=(
            "clamped(highest - p.window, 0, LAST)",
            "clamped(highest - p.window - 1, 0, LAST)",
        ),
        tiles_begin_with_the_window_of_their_last_row=(
            "clamped(lowest - p.window",
            "clamped(highest - p.window",
        ),
        tiles_end_before_their_last_row=(
            "min(highest + 1, keys)",
            "min(highest, keys)",
        ),
        positions_begin_at_zero=("p.key_pos ? 0 : p.first_pos", "0"),
        listed_positions_are_not_read=("if (listed) at =", "if (false) at ="),
        no_soft_cap=("if (p.cap_log2 > 0.0f) x", "if (false) x"),
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
            "first_key + begin + int64_t(step) * KEYS, first_key + end",
            "begin + int64_t(step) * KEYS, end",
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
        sinks_are_scaled=("*sink * LOG2_E", "*sink"),
        parts_overlap=("min(part * each, steps_all)", "min(part * (each - 1), steps_all)"),
        parts_weigh_alike=("const float weight = power2(lse - top)", "const float weight = 1.0f"),
        the_last_part_is_left_out=(
            "for (int i = 0; i < p.parts; ++i) {",
            "for (int i = 0; i < p.parts - 1; ++i) {",
        ),
        what_saw_no_key_is_read=("if (lse == NEVER) continue;", ""),
        log_sum_exp_in_base_two=("p.lse[at] = done.lse * LN_2", "p.lse[at] = done.lse"),
    ),
    **_of(
        "tile.cuh",
        no_bound_on_keys=("P::within(row) && token < end", "P::within(row)"),
        misaligned_vector=("(within ? 16 * piece : 0)", "(within ? 16 * piece + 2 : 0)"),
        pieces_lie_where_they_are_not_looked_for=(
            "        copy16_async(to + place<D>(row, piece), from, there);\n      });",
            "        copy16_async(to + row * D + 8 * piece, from, there);\n      });",
        ),
        fp8_pieces_change_places=(
            "low[i] = x[i], high[i] = x[8 + i]",
            "high[i] = x[i], low[i] = x[8 + i]",
        ),
        every_fp8_is_e4m3=("if (p.type == KeyType::E4M3)", "if (true)"),
    ),
}

FAULTS = {
    "rotate_scatter": ROTATE_SCATTER,
    "select": SELECT,
    "attention_mass": ATTENTION_MASS,
    "deltas": DELTAS,
    "gather": GATHER,
    "row_attention": ROW_ATTENTION,
}
