//! The subcommands, one file each: `XArgs` (its flags) and `run` (its work).

pub(crate) mod bench;
pub(crate) mod generate;
pub(crate) mod pull;
pub(crate) mod serve;
