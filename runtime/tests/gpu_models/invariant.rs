//! `--batch-invariant`: a sequence's logits have the same bits alone and in a batch, with its prompt whole or cut, computed or
//! taken from the prefix cache, with graphs and without; on 16-bit and quantised weights, on one rank and on two.

use ashlar::model_runner::ModelRunner;

use super::{
    common::{Item, families::VOCAB},
    quantized::{Kind, gguf},
    *,
};

/// Lengths around blocks, tiles of tokens and tiles of rows.
const LENGTHS: [usize; 13] = [1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 130, 257, 515];

fn prompts() -> Vec<Vec<TokenId>> {
    (0..)
        .zip(LENGTHS)
        .map(|(i, len)| prompt(i + 90, len))
        .collect()
}

/// Bits of a sequence's logits behind its prompt and behind each token that it drew, and those tokens.
#[derive(Default, PartialEq)]
struct Trace {
    bits: Vec<u32>,
    tokens: Vec<TokenId>,
}

/// Sequences that begin `stagger` steps after each other, each with its prompt in pieces of `piece` tokens, to `DECODED` tokens.
fn run<R: ModelRunner>(
    driver: &mut Driver<R>,
    prompts: &[Vec<TokenId>],
    stagger: usize,
    piece: usize,
) -> Vec<Trace> {
    let mut traces: Vec<Trace> = prompts.iter().map(|_| Trace::default()).collect();
    let mut rests: Vec<&[TokenId]> = prompts.iter().map(Vec::as_slice).collect();
    for step in 0.. {
        let running: Vec<usize> = (0..prompts.len())
            .filter(|i| i * stagger <= step && traces[*i].tokens.len() < DECODED)
            .collect();
        if running.is_empty() {
            break;
        }
        let last: Vec<Option<TokenId>> = running
            .iter()
            .map(|i| traces[*i].tokens.last().copied())
            .collect();
        let items: Vec<Item<'_>> = running
            .iter()
            .zip(&last)
            .map(|(i, last)| {
                let (tokens, rest) = rests[*i].split_at(piece.min(rests[*i].len()));
                rests[*i] = rest;
                Item {
                    slot: *i as u32,
                    tokens: last.as_ref().map_or(tokens, std::slice::from_ref),
                    logits: usize::from(rest.is_empty()),
                }
            })
            .collect();
        for (i, (logits, token)) in running.iter().zip(driver.step(&items)) {
            traces[*i]
                .bits
                .extend(logits.iter().map(|logit| logit.to_bits()));
            traces[*i].tokens.extend(token);
        }
    }
    (0..).zip(prompts).for_each(|(slot, _)| driver.finish(slot));
    for trace in &traces {
        assert_eq!(trace.bits.len(), DECODED * VOCAB);
        let is_finite = |bits: &u32| f32::from_bits(*bits).is_finite();
        assert!(trace.bits.iter().all(is_finite));
    }
    traces
}

fn same(what: &str, found: &[Trace], alone: &[Trace]) {
    for ((found, alone), len) in found.iter().zip(alone).zip(LENGTHS) {
        assert!(
            found.tokens == alone.tokens,
            "{what}: {len} tokens draw others"
        );
        assert!(
            found.bits == alone.bits,
            "{what}: {len} tokens have other bits"
        );
    }
}

/// What every sequence has alone, after it was compared with everything else that it could have run in.
fn check<R: ModelRunner>(what: &str, driver: &mut Driver<R>) -> Vec<Trace> {
    let prompts = prompts();
    let alone: Vec<Trace> = prompts
        .iter()
        .flat_map(|prompt| run(driver, std::slice::from_ref(prompt), 0, usize::MAX))
        .collect();
    let all = |driver: &mut Driver<R>, stagger, piece| run(driver, &prompts, stagger, piece);
    let case = |how: &str| format!("{what} {how}");
    same(&case("in a batch"), &all(driver, 0, usize::MAX), &alone);
    same(
        &case("one after another"),
        &all(driver, 1, usize::MAX),
        &alone,
    );
    same(&case("in pieces of 7"), &all(driver, 3, 7), &alone);
    same(&case("in pieces of 61"), &all(driver, 0, 61), &alone);
    // Sequence 0 computes a prompt, and sequence 1 takes the first blocks of it.
    for (prompt, alone) in prompts.iter().zip(&alone) {
        let cached = (prompt.len() - 1) / 16 * 16;
        let item = |slot, tokens, logits| Item {
            slot,
            tokens,
            logits,
        };
        driver.step(&[item(0, prompt.as_slice(), 0)]);
        driver.share(0, 1, cached as u32);
        let (logits, token) = driver.step(&[item(1, &prompt[cached..], 1)]).remove(0);
        let bits: Vec<u32> = logits.iter().map(|logit| logit.to_bits()).collect();
        let what = format!("{what}: {cached} of {} tokens from the cache", prompt.len());
        assert!(bits == alone.bits[..VOCAB], "{what}");
        assert_eq!(token, Some(alone.tokens[0]), "{what}");
        driver.finish(1);
        driver.finish(0);
    }
    alone
}

#[test]
fn invariant_logits_are_the_same_in_every_batch() {
    for family in families() {
        let folder = checkpoint(&family);
        for float in [Float::Bf16, Float::F16] {
            let [eager, graphs] = [true, false].map(|enforce_eager| {
                let config = CudaRunnerConfig {
                    batch_invariant: true,
                    ..config(&folder, float, enforce_eager)
                };
                let mut driver = Driver::new(CudaRunner::new(&config).unwrap());
                let how = if enforce_eager { "eager" } else { "graphs" };
                check(&format!("{} {float:?} {how}", family.name), &mut driver)
            });
            same(family.name, &graphs, &eager);
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn invariant_logits_of_quantised_weights_are_the_same_in_every_batch() {
    let family = &families()[0];
    let (fp8, awq) = (checkpoint(family), checkpoint(family));
    quantize(&awq, 64);
    let folder = tempfile::tempdir().unwrap();
    let blocks = folder.path().join("blocks.gguf");
    gguf(&blocks, (Kind::Q4_1, Kind::Q8_0));
    for (what, path, float, quantize_fp8) in [
        ("fp8", &fp8, Float::Bf16, true),
        ("AWQ", &awq, Float::F16, false),
        ("GGUF", &blocks, Float::F16, false),
    ] {
        let config = CudaRunnerConfig {
            batch_invariant: true,
            quantize_fp8,
            ..config(path, float, false)
        };
        check(what, &mut Driver::new(CudaRunner::new(&config).unwrap()));
    }
    fs::remove_dir_all(&fp8).unwrap();
    fs::remove_dir_all(&awq).unwrap();
}

#[test]
fn invariant_logits_of_ranks_are_the_same_in_every_batch() {
    for family in &families()[..3] {
        let folder = checkpoint(family);
        let config = CudaRunnerConfig {
            batch_invariant: true,
            ..config(&folder, Float::Bf16, false)
        };
        check(
            &format!("{} on 2 ranks", family.name),
            &mut gpus(&config, 2),
        );
        fs::remove_dir_all(&folder).unwrap();
    }
}
