//! Which files of a repository a runtime needs. Pure.

use std::collections::BTreeSet;

use super::HubError;

/// Most names shown in an error message.
const NAMES_SHOWN: usize = 20;

/// Name of the file that lists the shards of a model.
pub const SAFETENSORS_INDEX: &str = "model.safetensors.index.json";

/// The user's patterns. `*` matches within and across folders, `?` one character.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Only files that match one of these; empty means what the runtime needs.
    pub include: Vec<String>,
    /// Never files that match one of these.
    pub exclude: Vec<String>,
}

impl Selection {
    /// True when the user said nothing.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }
}

/// Picks from `names` (all safe paths, as listed). `shards` holds the file names of the safetensors index, if there is one.
///
/// By default: configuration, tokenizer and chat template from the repository's root, and one set of safetensors; the
/// copies that some repositories carry beside them (`consolidated*`, `original/`, `onnx/`, PyTorch) stay out.
///
/// # Errors
/// [`HubError::NothingSelected`], or [`HubError::NoWeights`] when the default finds nothing to load.
pub fn select(
    repo: &str,
    names: &[String],
    shards: Option<&BTreeSet<String>>,
    patterns: &Selection,
) -> Result<Vec<String>, HubError> {
    let excluded = |name: &str| {
        patterns
            .exclude
            .iter()
            .any(|pattern| matches(pattern, name))
    };
    let picked: Vec<String> = if patterns.include.is_empty() {
        let mut picked: Vec<String> = names
            .iter()
            .filter(|name| is_support_file(name))
            .cloned()
            .collect();
        picked.extend(default_weights(repo, names, shards)?);
        picked
    } else {
        names
            .iter()
            .filter(|name| {
                patterns
                    .include
                    .iter()
                    .any(|pattern| matches(pattern, name))
            })
            .cloned()
            .collect()
    };
    let mut picked: Vec<String> = picked.into_iter().filter(|name| !excluded(name)).collect();
    picked.sort();
    picked.dedup();
    if picked.is_empty() {
        return Err(HubError::NothingSelected {
            repo: repo.to_owned(),
            include: patterns.include.clone(),
            exclude: patterns.exclude.clone(),
            files: shown(names.iter().map(String::as_str)),
        });
    }
    Ok(picked)
}

fn is_support_file(name: &str) -> bool {
    if let Some(template) = name.strip_prefix("additional_chat_templates/") {
        return template.ends_with(".jinja") && !template.contains('/');
    }
    // sentence-transformers' own: how embeddings are made.
    if name == "1_Pooling/config.json" {
        return true;
    }
    let known = ["tokenizer.model", "merges.txt", "vocab.txt"];
    !name.contains('/')
        && (name.ends_with(".jinja")
            || known.contains(&name)
            || (name.ends_with(".json") && !name.ends_with(".index.json"))
            || name == SAFETENSORS_INDEX)
}

fn default_weights(
    repo: &str,
    names: &[String],
    shards: Option<&BTreeSet<String>>,
) -> Result<Vec<String>, HubError> {
    let no_weights = |found: String| HubError::NoWeights {
        repo: repo.to_owned(),
        found,
    };
    if let Some(shards) = shards {
        if let Some(missing) = shards.iter().find(|shard| !names.contains(shard)) {
            return Err(no_weights(format!(
                "{SAFETENSORS_INDEX} names {missing}, which the repository lacks"
            )));
        }
        return Ok(shards.iter().cloned().collect());
    }
    if names.iter().any(|name| name == "model.safetensors") {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let root = |suffix: &'static str| {
        names
            .iter()
            .filter(move |name| !name.contains('/') && name.ends_with(suffix))
    };
    let loose: Vec<String> = root(".safetensors")
        .filter(|name| !name.starts_with("consolidated"))
        .cloned()
        .collect();
    if !loose.is_empty() {
        return Ok(loose);
    }
    let gguf: Vec<&String> = names
        .iter()
        .filter(|name| name.ends_with(".gguf"))
        .collect();
    match gguf.as_slice() {
        [] => {}
        [only] => return Ok(vec![(*only).clone()]),
        several => {
            let list = shown(several.iter().map(|name| name.as_str()));
            return Err(no_weights(format!(
                "several GGUF files, so name one with --include or hf://{repo}/FILE.gguf: {list}"
            )));
        }
    }
    Err(no_weights(format!(
        "it needs .safetensors or .gguf files; there are: {}",
        shown(names.iter().map(String::as_str))
    )))
}

fn shown<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let more = names.len().saturating_sub(NAMES_SHOWN);
    let list = names[..names.len() - more].join(", ");
    if more == 0 {
        list
    } else {
        format!("{list} and {more} more")
    }
}

/// The name if it may become a path below a folder: relative, no `..`, no empty part, no control character, no
/// backslash, and not our own `.ashlar`.
#[must_use]
pub fn safe_path(name: &str) -> Option<&str> {
    let part = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    let fine = !name.is_empty()
        && name.len() <= 1024
        && !name.chars().any(|c| c.is_control() || c == '\\')
        && name.split('/').all(part)
        && name.split('/').next() != Some(super::store::OWN_FOLDER);
    fine.then_some(name)
}

/// Shell-like match of a whole name, in time linear in pattern × name.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last `*` stood, and how much of the name it has taken: the only place a mismatch goes back to.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    fn picked(list: &[&str], include: &[&str], exclude: &[&str]) -> Vec<String> {
        select(
            "a/b",
            &names(list),
            None,
            &Selection {
                include: names(include),
                exclude: names(exclude),
            },
        )
        .unwrap()
    }

    const MISTRAL: &[&str] = &[
        ".gitattributes",
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "onnx/config.json",
        "original/x.safetensors",
        "params.json",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ];

    #[test]
    fn takes_the_shards_of_the_index_and_no_copies() {
        let shards = BTreeSet::from([
            "model-00001-of-00002.safetensors".to_owned(),
            "model-00002-of-00002.safetensors".to_owned(),
        ]);
        let got = select("a/b", &names(MISTRAL), Some(&shards), &Selection::default()).unwrap();
        let want = [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "params.json",
            "tokenizer.json",
            "tokenizer.model",
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn an_index_that_names_a_missing_shard_is_an_error() {
        let shards = BTreeSet::from(["model-00003-of-00003.safetensors".to_owned()]);
        let error =
            select("a/b", &names(MISTRAL), Some(&shards), &Selection::default()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("model-00003-of-00003.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn one_safetensors_file_wins_over_its_variants() {
        assert_eq!(
            picked(
                &["config.json", "model.safetensors", "model.fp16.safetensors"],
                &[],
                &[]
            ),
            ["config.json", "model.safetensors"]
        );
    }

    #[test]
    fn several_gguf_files_must_be_told_apart() {
        let error = select(
            "a/b",
            &names(&["x-Q4.gguf", "x-Q8.gguf", "README.md"]),
            None,
            &Selection::default(),
        )
        .unwrap_err();
        assert!(
            error.to_string().contains("x-Q4.gguf") && error.to_string().contains("--include"),
            "{error}"
        );
        assert_eq!(
            picked(&["x-Q4.gguf", "x-Q8.gguf"], &["*Q4.gguf"], &[]),
            ["x-Q4.gguf"]
        );
        assert_eq!(
            picked(&["q/only.gguf", "README.md"], &[], &[]),
            ["q/only.gguf"]
        );
    }

    #[test]
    fn pytorch_only_and_empty_selections_say_what_is_there() {
        let error = select(
            "a/b",
            &names(&["pytorch_model.bin"]),
            None,
            &Selection::default(),
        )
        .unwrap_err();
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
        let patterns = Selection {
            include: names(&["*.gguf"]),
            exclude: vec![],
        };
        let error = select("a/b", &names(&["config.json"]), None, &patterns).unwrap_err();
        assert!(
            matches!(error, HubError::NothingSelected { .. })
                && error.to_string().contains("config.json"),
            "{error}"
        );
    }

    #[test]
    fn exclude_wins_over_include() {
        assert_eq!(
            picked(&["a.json", "b.json", "model.safetensors"], &[], &["b.*"]),
            ["a.json", "model.safetensors"]
        );
        assert_eq!(
            picked(&["a.json", "b.json"], &["*.json"], &["b*"]),
            ["a.json"]
        );
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, want) in [
            ("*", "a/b", true),
            ("*.json", "a/b.json", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyy", false),
            ("", "", true),
            ("", "a", false),
            ("**", "", true),
            ("*a", "aaab", false),
            ("a", "aa", false),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern:?} on {name:?}");
        }
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "./a",
            "a/.",
            "a\\b",
            "a\0b",
            "a\nb",
            ".ashlar/manifest.json",
            "a/",
        ] {
            assert!(safe_path(bad).is_none(), "{bad:?}");
        }
        for good in [
            "config.json",
            "a/b.json",
            ".gitattributes",
            "a..b",
            "x y.json",
        ] {
            assert!(safe_path(good).is_some(), "{good:?}");
        }
    }
}
