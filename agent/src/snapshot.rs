//! Snapshots: the state of a workload -> bytes that outlive it, and back.
//!
//! A snapshot is one *generation* of a workload: its files and, if asked, the images of its processes. It is
//! there whole or not at all, and once it has proved healthy it is *good*. [`files`] takes files and puts them back.
//! [`criu`] does that with running processes. [`store`] keeps generations on disk; what is in them, it does not know:
//! entries with a name, some bytes of metadata and a content. [`generation`] is the files of a workload in the store,
//! [`process`] its processes; [`scratch`] is where their images are in between; [`schedule`] says when one
//! is due.

pub mod criu;
pub mod files;
pub mod generation;
pub mod process;
pub mod schedule;
pub mod scratch;
pub mod store;
