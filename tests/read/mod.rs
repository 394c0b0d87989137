//! Reading through its public interface: memories of a bank, logits.

mod generate;
mod memories;
mod model;
mod quality;
