//! TODO
mod device;
pub use device::{DType, Device, ParseDeviceError};
