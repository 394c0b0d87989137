//! Selection weights on a burn backend, for padded batches: the scores stay on the device, one weight per token
//! comes back to the host.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::Score;

/// A logit that no real one reaches and whose exponential is 0; finite, so that no mask can make NaN.
const MASKED: f32 = -1e30;

/// Selection weights `[batch, kv_head, token]` in f32.
///
/// `q` is `[batch, token, head, dim]` and `k` `[batch, token, kv_head, dim]`, both before RoPE, in any float format.
/// `real` is `[batch, token]`: 1 for tokens, 0 for padding. Weights of padding are 0 or next to it.
pub fn weights<B: Backend>(q: Tensor<B, 4>, k: Tensor<B, 4>, real: Tensor<B, 2>, score: Score) -> Tensor<B, 3> {
    let [batch, tokens, heads, dim] = q.dims();
    let kv_heads = k.dims()[2];
    let rows = heads / kv_heads * tokens; // one per query head of the group and query

    // 1. logits = q k^T / sqrt(d), [batch, kv_head, group * token, token]; no mask, no RoPE, f32
    #[allow(clippy::cast_possible_truncation)] // f64 to f32: the scale is a constant of the model
    let scale = (1.0 / (dim as f64).sqrt()) as f32;
    let q = q.cast(DType::F32).mul_scalar(scale).swap_dims(1, 2).reshape([batch, kv_heads, rows, dim]);
    let k = k.cast(DType::F32).permute([0, 2, 3, 1]);
    let logits = q.matmul(k);

    // 2. padding gives and receives nothing
    let real = real.cast(DType::F32);
    let key_is_pad = real.clone().equal_elem(0.0).reshape([batch, 1, 1, tokens]);
    let logits = logits.mask_fill(key_is_pad, MASKED);
    let query_is_real = real
        .reshape([batch, 1, 1, tokens, 1])
        .expand([batch, 1, heads / kv_heads, tokens, 1])
        .reshape([batch, 1, rows, 1]);

    // 3. what each query gives to each key
    let given = match score {
        Score::Softmax => softmax(logits, 3) * query_is_real,
        Score::Exp => {
            let query_is_pad = query_is_real.equal_elem(0.0);
            let logits = logits.mask_fill(query_is_pad, MASKED);
            let max = logits.clone().max_dim(3).max_dim(2); // one for each chunk and kv head
            (logits - max).exp()
        }
    };

    // 4. sum over the group's query heads and the queries
    given.sum_dim(2).reshape([batch, kv_heads, tokens])
}
