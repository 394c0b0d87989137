//! The one integration-test binary: a module per area, so that burn and FAISS are linked once.

mod bank;
mod codec;
mod compile;
mod corpus;
mod embed;
mod model;
mod select;
