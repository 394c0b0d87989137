//! Keys and values of the prefix at the memory layers, as a bank stores them.
//!
//! The bytes are safetensors and depend on nothing but the values: the same prefix of the same model gives the same
//! file. The tensors: `tokens` and `layers` (u32), `k` and `v` (f32, `[layer][head][r][dim]`).

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::error::ModelError;

/// Keys (after RoPE, positions `0..r`) and values of the prefix at the memory layers.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefixKv {
    /// The prefix's token ids; r of them, at least one.
    pub tokens: Vec<u32>,
    /// The memory layers, increasing.
    pub layers: Vec<usize>,
    /// Key-value heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys after RoPE, `[layer][head][r][dim]`.
    pub k: Vec<f32>,
    /// Values, `[layer][head][r][dim]`.
    pub v: Vec<f32>,
}

impl PrefixKv {
    /// The safetensors file.
    ///
    /// # Errors
    /// A field does not fit the others, or a layer number is above `u32::MAX`.
    pub fn to_safetensors_bytes(&self) -> Result<Vec<u8>, ModelError> {
        let refused = |source| ModelError::PrefixFormat { source };
        let layers: Result<Vec<u32>, _> = self.layers.iter().map(|&layer| u32::try_from(layer)).collect();
        let layers = layers.map_err(|_| ModelError::Prefix { cause: "a layer number is too large" })?;
        let shape = vec![self.layers.len(), self.kv_heads, self.tokens.len(), self.head_dim];
        let words = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let (tokens, layers, k, v) = (words(&self.tokens), words(&layers), floats(&self.k), floats(&self.v));
        let views = [
            ("k", TensorView::new(Dtype::F32, shape.clone(), &k).map_err(refused)?),
            ("layers", TensorView::new(Dtype::U32, vec![self.layers.len()], &layers).map_err(refused)?),
            ("tokens", TensorView::new(Dtype::U32, vec![self.tokens.len()], &tokens).map_err(refused)?),
            ("v", TensorView::new(Dtype::F32, shape, &v).map_err(refused)?),
        ];
        // The serializer sorts tensors itself; metadata would come in random order, so there is none.
        safetensors::serialize(views, None).map_err(refused)
    }

    /// Reads a file written by [`PrefixKv::to_safetensors_bytes`].
    ///
    /// # Errors
    /// The bytes are no safetensors file, or tensors are missing or do not fit each other.
    pub fn from_safetensors_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        let refused = |source| ModelError::PrefixFormat { source };
        let file = SafeTensors::deserialize(bytes).map_err(refused)?;
        let words = |name: &str| {
            let view = file.tensor(name).map_err(refused)?;
            if view.dtype() != Dtype::U32 || view.shape().len() != 1 {
                return Err(ModelError::Prefix { cause: "tokens or layers are not u32 vectors" });
            }
            Ok(view.data().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect::<Vec<u32>>())
        };
        let floats = |name: &str| {
            let view = file.tensor(name).map_err(refused)?;
            let shape = <[usize; 4]>::try_from(view.shape()).ok().filter(|_| view.dtype() == Dtype::F32);
            let shape = shape.ok_or(ModelError::Prefix { cause: "k or v is not an f32 tensor of rank 4" })?;
            let values: Vec<f32> = view.data().as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect();
            Ok::<_, ModelError>((shape, values))
        };
        let (tokens, layers) = (words("tokens")?, words("layers")?);
        let ((shape, k), (v_shape, v)) = (floats("k")?, floats("v")?);
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrefix);
        }
        if shape != v_shape || shape[0] != layers.len() || shape[2] != tokens.len() {
            return Err(ModelError::Prefix { cause: "shapes of tokens, layers, k and v do not fit each other" });
        }
        let layers: Result<Vec<usize>, _> = layers.into_iter().map(usize::try_from).collect();
        let layers = layers.map_err(|_| ModelError::Prefix { cause: "a layer number is too large" })?;
        Ok(Self { tokens, layers, kv_heads: shape[1], head_dim: shape[3], k, v })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> PrefixKv {
        let values: Vec<f32> = (0..2_u8 * 3 * 2 * 4).map(f32::from).collect();
        PrefixKv {
            tokens: vec![1, 99_999],
            layers: vec![0, 7],
            kv_heads: 3,
            head_dim: 4,
            v: values.iter().map(|value| -value).collect(),
            k: values,
        }
    }

    #[test]
    fn bytes_give_the_prefix_back_and_are_always_the_same() {
        let bytes = example().to_safetensors_bytes().unwrap();
        assert_eq!(PrefixKv::from_safetensors_bytes(&bytes).unwrap(), example());
        assert_eq!(example().to_safetensors_bytes().unwrap(), bytes);
    }

    #[test]
    fn damaged_bytes_are_errors() {
        let bytes = example().to_safetensors_bytes().unwrap();
        for end in 0..bytes.len() {
            assert!(PrefixKv::from_safetensors_bytes(&bytes[..end]).is_err(), "{end}");
        }
        let mut odd = example();
        odd.tokens.push(3);
        assert!(odd.to_safetensors_bytes().is_err());
        odd = example();
        odd.layers.pop();
        assert!(odd.to_safetensors_bytes().is_err());
    }
}
