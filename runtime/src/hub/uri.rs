//! The addresses a user writes for a model.

use std::path::{Path, PathBuf};

use super::HubError;

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelUri {
    /// A folder in the hub's layout or a `.gguf` file on this machine.
    Local(PathBuf),
    /// `hf://OWNER/NAME[/FILE.gguf][@REVISION]`.
    Hub {
        /// `OWNER/NAME`, or `NAME` alone for the oldest models.
        repo: String,
        /// Commit, branch or tag.
        revision: Option<String>,
        /// The one file wanted.
        file: Option<String>,
    },
    /// `s3://BUCKET[/FOLDER][/FILE.gguf]`.
    Bucket {
        /// The bucket.
        bucket: String,
        /// Folder in it, without slashes around it; may be empty.
        folder: String,
        /// The one file wanted.
        file: Option<String>,
    },
}

impl ModelUri {
    /// Reads an address. A bare `OWNER/NAME` that is no local path means the hub, as in vLLM.
    ///
    /// # Errors
    /// [`HubError::BadUri`] for an unknown scheme, a malformed name, or a local path that does not exist.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let bad = |reason| HubError::BadUri {
            uri: text.to_owned(),
            reason,
        };
        if let Some(rest) = text.strip_prefix("hf://") {
            return parse_hub(rest).map_err(bad);
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            return parse_bucket(rest).map_err(bad);
        }
        if let Some(path) = text.strip_prefix("file://") {
            return local(Path::new(path)).ok_or_else(|| bad("no such file or folder"));
        }
        if text.contains("://") {
            return Err(bad("the scheme is not one this command can read"));
        }
        if let Some(found) = local(Path::new(text)) {
            return Ok(found);
        }
        let looks_local = text.starts_with(['.', '/', '~']) || text.ends_with(".gguf");
        if !looks_local && text.matches('/').count() == 1 {
            return parse_hub(text).map_err(bad);
        }
        Err(bad("no such file or folder"))
    }
}

fn local(path: &Path) -> Option<ModelUri> {
    path.exists().then(|| ModelUri::Local(path.to_path_buf()))
}

fn parse_hub(rest: &str) -> Result<ModelUri, &'static str> {
    let (name, revision) = match rest.split_once('@') {
        Some((name, revision)) => (name, Some(revision.to_owned())),
        None => (rest, None),
    };
    let name = name.trim_end_matches('/');
    let mut parts = name.splitn(3, '/');
    let owner = parts.next().unwrap_or_default();
    let repo = parts
        .next()
        .map_or_else(|| owner.to_owned(), |second| format!("{owner}/{second}"));
    let file = parts.next().map(str::to_owned);
    check_repo(&repo)?;
    if let Some(revision) = &revision {
        check_revision(revision)?;
    }
    if file
        .as_deref()
        .is_some_and(|file| !file.ends_with(".gguf") || super::select::safe_path(file).is_none())
    {
        return Err("only a .gguf file may be named after the repository");
    }
    Ok(ModelUri::Hub {
        repo,
        revision,
        file,
    })
}

fn parse_bucket(rest: &str) -> Result<ModelUri, &'static str> {
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let named = (3..=63).contains(&bucket.len())
        && bucket.chars().all(allowed)
        && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
        && bucket.ends_with(|c: char| c.is_ascii_alphanumeric());
    if !named {
        return Err("a bucket's name has 3 to 63 lower-case letters, digits, '-' and '.'");
    }
    let path = path.trim_end_matches('/');
    if !path.is_empty() && super::select::safe_path(path).is_none() {
        return Err("a folder is made of plain names, without '..' and without empty ones");
    }
    let (folder, file) = match path.rsplit_once('/') {
        _ if !path.ends_with(".gguf") => (path, None),
        Some((folder, file)) => (folder, Some(file.to_owned())),
        None => ("", Some(path.to_owned())),
    };
    Ok(ModelUri::Bucket {
        bucket: bucket.to_owned(),
        folder: folder.to_owned(),
        file,
    })
}

/// Accepts what the hub accepts as a repository: one or two segments of letters, digits, `-`, `_`, `.`.
///
/// # Errors
/// The reason, in words.
pub fn check_repo(repo: &str) -> Result<(), &'static str> {
    let segment = |text: &str| {
        !text.is_empty()
            && text.len() <= 96
            && !text.starts_with(['.', '-'])
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    if repo.split('/').count() <= 2 && repo.split('/').all(segment) {
        Ok(())
    } else {
        Err("a repository is OWNER/NAME, of letters, digits, '-', '_' and '.'")
    }
}

/// Accepts a commit, branch, tag or `refs/pr/N`.
///
/// # Errors
/// The reason, in words.
pub fn check_revision(revision: &str) -> Result<(), &'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+');
    if !revision.is_empty()
        && revision.len() <= 255
        && !revision.contains("..")
        && revision.chars().all(allowed)
    {
        Ok(())
    } else {
        Err("a revision is a commit, branch or tag, of letters, digits, '-', '_', '.', '/' and '+'")
    }
}

/// True for a full commit id, which never moves.
#[must_use]
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40
        && revision
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    fn hub(repo: &str, revision: Option<&str>, file: Option<&str>) -> ModelUri {
        ModelUri::Hub {
            repo: repo.into(),
            revision: revision.map(Into::into),
            file: file.map(Into::into),
        }
    }

    #[test]
    fn reads_every_form() {
        assert_eq!(ModelUri::parse("hf://a/b").unwrap(), hub("a/b", None, None));
        assert_eq!(
            ModelUri::parse("hf://gpt2").unwrap(),
            hub("gpt2", None, None)
        );
        assert_eq!(
            ModelUri::parse("hf://a/b@refs/pr/1").unwrap(),
            hub("a/b", Some("refs/pr/1"), None)
        );
        assert_eq!(
            ModelUri::parse("hf://a/b/q4/x.gguf@v1").unwrap(),
            hub("a/b", Some("v1"), Some("q4/x.gguf"))
        );
        assert_eq!(
            ModelUri::parse("no-such-owner/name").unwrap(),
            hub("no-such-owner/name", None, None)
        );
        let bucket = |bucket: &str, folder: &str, file: Option<&str>| ModelUri::Bucket {
            bucket: bucket.into(),
            folder: folder.into(),
            file: file.map(Into::into),
        };
        for (text, expected) in [
            ("s3://models", bucket("models", "", None)),
            ("s3://models/a/b/", bucket("models", "a/b", None)),
            ("s3://models/x.gguf", bucket("models", "", Some("x.gguf"))),
            (
                "s3://my.models/a/x.gguf",
                bucket("my.models", "a", Some("x.gguf")),
            ),
        ] {
            assert_eq!(ModelUri::parse(text).unwrap(), expected);
        }
        let here = tempfile::tempdir().unwrap();
        let path = here.path().to_str().unwrap();
        assert_eq!(
            ModelUri::parse(path).unwrap(),
            ModelUri::Local(here.path().into())
        );
        assert_eq!(
            ModelUri::parse(&format!("file://{path}")).unwrap(),
            ModelUri::Local(here.path().into())
        );
    }

    #[test]
    fn refuses_what_could_reach_elsewhere() {
        for bad in [
            "hf://",
            "hf://a/../b",
            "hf://a/b@",
            "hf://a/b@..",
            "hf://a/b@x y",
            "hf://a b/c",
            "hf://../etc",
            "hf://a/b/../../x.gguf",
            "hf://a/b/config.json",
            "ftp://a/b",
            "s3://",
            "s3://ab/m",
            "s3://Models/m",
            "s3://models/../x",
            "s3://models/a//b",
            "/no/such/folder",
            "./no/such",
            "x.gguf",
            "a/b/c",
            "",
        ] {
            assert!(ModelUri::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn a_commit_is_forty_hex_digits() {
        assert!(is_commit(&"0a".repeat(20)));
        assert!(!is_commit(&"0A".repeat(20)) && !is_commit("main") && !is_commit(&"0a".repeat(19)));
    }
}
