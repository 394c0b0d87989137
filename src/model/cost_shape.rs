//! A decoder's sizes as the cost model takes them.

use super::ModelConfig;
use crate::cost::ModelShape;

impl ModelConfig {
    /// The sizes that [`crate::cost`] needs, for this many memory layers.
    pub fn cost_shape(&self, memory_layers: usize) -> ModelShape {
        ModelShape {
            layers: self.num_hidden_layers,
            memory_layers,
            hidden: self.hidden_size,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            intermediate: self.intermediate_size,
            vocab: self.vocab_size,
        }
    }
}
