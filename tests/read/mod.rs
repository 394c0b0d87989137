//! Reading through its public interface: memories of a bank, logits, sequences, texts.

mod generate;
mod memories;
mod model;
mod quality;
mod session;
