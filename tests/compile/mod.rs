//! The program as a user runs it: compile, search, show, inspect, verify, through the binary and on real files.

mod damage;
mod examples;
mod hostile;
mod identity;
mod incremental;
mod operate;
mod plan;
pub mod program;
mod quality;
mod verbs;
