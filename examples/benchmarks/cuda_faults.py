"""Faults for ``cuda_mutants.py``: in which file of ``csrc/cuda`` what becomes what."""

from __future__ import annotations

from cuda_faults_of_latents import LATENT_ATTENTION
from cuda_faults_of_rows import ROW_ATTENTION
from cuda_planted import of_file

ROTATE_SCATTER = {
    **of_file(
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
    **of_file(
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
    **of_file(
        "elements.cuh",
        fp8_does_not_saturate=("__NV_SATFINITE", "__NV_NOSAT"),
        two_floats_change_places=(
            "pair.x = x[2 * i], pair.y = x[2 * i + 1]",
            "pair.y = x[2 * i], pair.x = x[2 * i + 1]",
        ),
    ),
}

DELTAS = {
    **of_file(
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
    **of_file(
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
    **of_file(
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

ATTENTION_MASS = of_file(
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
    listed_positions_are_not_read=(
        "p.key_pos ? p.key_pos[key] : p.first_pos + key",
        "p.first_pos + key",
    ),
    bounds_of_the_first_of_a_lane_s_keys=(
        "lowest = min(lowest, pos), highest = max(highest, pos);",
        "",
    ),
    bounds_of_half_a_warp_s_keys=(
        "for (int by = 4; by < 32; by *= 2)",
        "for (int by = 4; by < 16; by *= 2)",
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

GATHER = of_file(
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

FAULTS = {
    "rotate_scatter": ROTATE_SCATTER,
    "select": SELECT,
    "attention_mass": ATTENTION_MASS,
    "deltas": DELTAS,
    "gather": GATHER,
    "row_attention": ROW_ATTENTION,
    "latent_attention": LATENT_ATTENTION,
}
