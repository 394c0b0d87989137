//! Reading through its public interface: memories of a bank, logits.

mod memories;
mod model;
