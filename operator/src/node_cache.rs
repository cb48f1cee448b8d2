//! `ashlar-operator node-cache`: makes the folders in which model pods of a node keep what they download, and stays until it is
//! told to go, as a DaemonSet's pod does.

use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};

/// User and group of model pods.
const USER: u32 = 65532;
/// Others of the node may neither read nor write.
const MODE: u32 = 0o750;

/// Arguments of `ashlar-operator node-cache`.
#[derive(Debug, Clone, clap::Args)]
pub struct NodeCacheArgs {
    /// The cache's folder on the node.
    #[arg(long, value_name = "FOLDER")]
    pub path: PathBuf,
    /// A namespace that gets a folder of its own; may be given several times.
    #[arg(long = "namespace", value_name = "NAMESPACE")]
    pub namespaces: Vec<String>,
}

/// Why a folder could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NodeCacheError {
    /// The file system said no.
    #[error(
        "cannot make {path} for user {USER}: run as root with CHOWN, and mount a folder that may be written"
    )]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A name that is no namespace's could lead elsewhere.
    #[error("{0:?} is no namespace's name")]
    Namespace(String),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
}

/// Makes the folders, then waits for SIGTERM or SIGINT.
///
/// # Errors
/// [`NodeCacheError`].
pub async fn run(args: &NodeCacheArgs) -> Result<(), NodeCacheError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(NodeCacheError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeCacheError::Signals)?;
    make(args, Some(USER))?;
    tracing::info!(path = %args.path.display(), namespaces = ?args.namespaces, "the folders are there");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn make(args: &NodeCacheArgs, owner: Option<u32>) -> Result<(), NodeCacheError> {
    for namespace in &args.namespaces {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if namespace.is_empty() || !namespace.chars().all(plain) {
            return Err(NodeCacheError::Namespace(namespace.clone()));
        }
        let path = args.path.join(namespace);
        make_one(&path, owner).map_err(|source| NodeCacheError::Folder { path, source })?;
    }
    Ok(())
}

fn make_one(path: &Path, owner: Option<u32>) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(MODE)
        .create(path)?;
    // One that was there before, or a umask.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))?;
    chown(path, owner, owner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn each_namespace_has_a_folder_that_others_cannot_read() {
        let dir = tempfile::tempdir().unwrap();
        let args = |namespaces: &[&str]| NodeCacheArgs {
            path: dir.path().join("models"),
            namespaces: namespaces.iter().map(|&name| name.to_owned()).collect(),
        };
        make(&args(&["chat", "search"]), None).unwrap();
        make(&args(&["chat"]), None).unwrap();
        for name in ["chat", "search"] {
            let found = std::fs::metadata(dir.path().join("models").join(name)).unwrap();
            assert_eq!(found.permissions().mode() & 0o777, MODE);
        }
        for bad in ["", "..", "a/b"] {
            let refused = make(&args(&[bad]), None);
            assert!(
                matches!(refused, Err(NodeCacheError::Namespace(_))),
                "{bad:?}"
            );
        }
    }
}
