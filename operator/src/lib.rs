//! Controller, autoscaler and gateway of Ashlar.

pub mod gateway;
