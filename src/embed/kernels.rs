//! The element-wise steps of an encoder layer, for any backend, and fused ones for the CPU.
//!
//! In and out: tensors. The default of each step is written in burn's operations and runs anywhere; the CPU backend
//! (`flex`) replaces it by one pass over memory ([`super::math`]). Both give the same values within rounding: a test says so.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::activation;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorPrimitive};

use super::math;

/// Scale, bias and epsilon of a layer norm, with the bias of the linear layer in front of it.
#[derive(Clone, Debug)]
pub(super) struct AddNorm<B: Backend> {
    /// `[dim]`: added before the norm.
    pub(super) bias: Tensor<B, 1>,
    /// `[dim]`
    pub(super) gamma: Tensor<B, 1>,
    /// `[dim]`
    pub(super) beta: Tensor<B, 1>,
    pub(super) eps: f64,
}

/// A backend that runs encoders.
pub(super) trait EncoderBackend: Backend {
    /// `gelu(x + bias)`; x `[row, dim]`, bias `[dim]`.
    fn bias_gelu(x: Tensor<Self, 2>, bias: &Tensor<Self, 1>) -> Tensor<Self, 2> {
        activation::gelu(x + bias.clone().unsqueeze())
    }

    /// Softmax over keys; scores `[batch, head, query, key]`, mask `[batch, key]`: 0, or a large negative number for padding.
    fn masked_softmax(scores: Tensor<Self, 4>, mask: Option<&Tensor<Self, 2>>) -> Tensor<Self, 4> {
        let scores = match mask {
            Some(mask) => {
                let [batch, keys] = mask.dims();
                scores + mask.clone().reshape([batch, 1, 1, keys])
            }
            None => scores,
        };
        activation::softmax(scores, 3)
    }

    /// `norm(x + residual + bias)`; x and residual `[row, dim]`.
    fn add_norm(x: Tensor<Self, 2>, residual: Tensor<Self, 2>, norm: &AddNorm<Self>) -> Tensor<Self, 2> {
        let x = x + residual + norm.bias.clone().unsqueeze();
        let normed = Self::layer_norm(
            x.into_primitive().tensor(),
            norm.gamma.clone().into_primitive().tensor(),
            Some(norm.beta.clone().into_primitive().tensor()),
            norm.eps,
        );
        Tensor::from_primitive(TensorPrimitive::Float(normed))
    }
}

#[cfg(feature = "cuda")]
impl EncoderBackend for burn::backend::Cuda {}

impl EncoderBackend for Flex {
    fn bias_gelu(x: Tensor<Self, 2>, bias: &Tensor<Self, 1>) -> Tensor<Self, 2> {
        let bias = read(bias.clone());
        change(x, |x| math::bias_gelu(x, floats(&bias)))
    }

    fn masked_softmax(scores: Tensor<Self, 4>, mask: Option<&Tensor<Self, 2>>) -> Tensor<Self, 4> {
        let [_, heads, queries, keys] = scores.dims();
        let mask = mask.map(|mask| read(mask.clone()));
        change(scores, |x| math::softmax(x, keys, mask.as_ref().map(|mask| (floats(mask), heads * queries))))
    }

    fn add_norm(x: Tensor<Self, 2>, residual: Tensor<Self, 2>, norm: &AddNorm<Self>) -> Tensor<Self, 2> {
        let residual = read(residual);
        let (bias, gamma, beta) = (read(norm.bias.clone()), read(norm.gamma.clone()), read(norm.beta.clone()));
        #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
        let eps = norm.eps as f32;
        change(x, |x| math::add_norm(x, floats(&residual), floats(&bias), floats(&gamma), floats(&beta), eps))
    }
}

/// The tensor's own storage, copied only if it is a strided view.
fn read<const D: usize>(tensor: Tensor<Flex, D>) -> FlexTensor {
    tensor.into_primitive().tensor().to_contiguous()
}

fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.storage()
}

/// Changes the values in place; a tensor that others hold too is copied first.
fn change<const D: usize>(tensor: Tensor<Flex, D>, change: impl FnOnce(&mut [f32])) -> Tensor<Flex, D> {
    let tensor = tensor.into_primitive().tensor();
    // Rebinding drops the first handle: otherwise the storage would count as shared, and be copied.
    let mut tensor = { tensor }.to_contiguous();
    change(tensor.storage_mut());
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;

    type Device = burn::backend::flex::FlexDevice;

    /// Flex again, but with the default steps.
    fn plain<const D: usize>(result: Tensor<Flex, D>) -> Vec<f32> {
        result.into_data().to_vec().unwrap()
    }

    fn assert_close(one: &[f32], two: &[f32]) {
        assert_eq!(one.len(), two.len());
        for (one, two) in one.iter().zip(two) {
            assert!((one - two).abs() <= 2e-5 * two.abs().max(1.0), "{one} {two}");
        }
    }

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
        Tensor::random(shape, Distribution::Normal(0.0, 2.0), &Device::default())
    }

    #[test]
    fn fused_steps_give_the_same_as_the_default_ones() {
        let (x, residual, bias) = (random([7, 48]), random([7, 48]), random([48]));
        let default = activation::gelu(x.clone() + bias.clone().unsqueeze());
        assert_close(&plain(Flex::bias_gelu(x.clone(), &bias)), &plain(default));

        let norm = AddNorm { bias: bias.clone(), gamma: random([48]), beta: random([48]), eps: 1e-5 };
        let sum = x.clone() + residual.clone() + bias.unsqueeze();
        let centered = sum.clone() - sum.mean_dim(1);
        let variance = centered.clone().powf_scalar(2.0).mean_dim(1);
        let default =
            centered / (variance + 1e-5).sqrt() * norm.gamma.clone().unsqueeze() + norm.beta.clone().unsqueeze();
        assert_close(&plain(Flex::add_norm(x, residual, &norm)), &plain(default));

        let scores = random([2, 3, 5, 9]);
        let default = activation::softmax(scores.clone(), 3);
        assert_close(&plain(Flex::masked_softmax(scores.clone(), None)), &plain(default));
        let mask: Tensor<Flex, 2> = random([2, 9]).clamp_max(0.0) * 1e4;
        let default = activation::softmax(scores.clone() + mask.clone().reshape([2, 1, 1, 9]), 3);
        assert_close(&plain(Flex::masked_softmax(scores, Some(&mask))), &plain(default));
    }
}
