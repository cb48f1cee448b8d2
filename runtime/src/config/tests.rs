#![allow(clippy::unwrap_used, missing_docs)] // Tests.

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    engine: EngineArgs,
}

fn parse(args: &[&str]) -> Result<EngineArgs, String> {
    Cli::try_parse_from([&["ashlar"], args].concat())
        .map(|cli| cli.engine)
        .map_err(|error| error.to_string())
}

#[test]
fn sizes_count_small_letters_in_thousands_and_capitals_in_1024s() {
    assert_eq!(parse_size("4096"), Ok(4096));
    assert_eq!(parse_size("32k"), Ok(32_000));
    assert_eq!(parse_size("32K"), Ok(32_768));
    assert_eq!(parse_size("25.6k"), Ok(25_600));
    assert_eq!(parse_size("1.5G"), Ok(1_610_612_736));
    for wrong in [
        "",
        "k",
        "-1",
        "1.5",
        "12q",
        "0x10",
        "nan",
        "1e9G",
        "99999999999999999999",
    ] {
        assert!(parse_size(wrong).is_err(), "{wrong}");
    }
    assert!(parse_u32("8G").is_err());
}

#[test]
fn a_misspelt_flag_names_the_nearest() {
    let error = parse(&["m.gguf", "--max-model-length=32k"]).unwrap_err();
    assert!(error.contains("--max-model-len"), "{error}");
}

#[test]
fn defaults_agree_with_the_command_line() {
    let parsed = parse(&["m.gguf"]).unwrap();
    assert_eq!(
        format!("{parsed:?}"),
        format!("{:?}", EngineArgs::new("m.gguf"))
    );
    assert!(parsed.prefix_caching());
}

#[test]
fn prefix_caching_is_decided_by_the_last_flag() {
    assert!(
        !parse(&["m", "--no-enable-prefix-caching"])
            .unwrap()
            .prefix_caching()
    );
    assert!(
        parse(&["m", "--enable-prefix-caching"])
            .unwrap()
            .prefix_caching()
    );
    assert!(
        parse(&["m", "--no-enable-prefix-caching", "--enable-prefix-caching"])
            .unwrap()
            .prefix_caching()
    );
}

#[test]
fn contradictions_and_what_the_cpu_cannot_do_are_refused_by_name() {
    let refused = |args: &[&str], part: &str| {
        let error = parse(args).unwrap().validate().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    // What needs a GPU is refused by a build without its kernels alone.
    for (flag, value, part) in [
        ("--device", "cuda", "--device cuda"),
        ("--tp", "2", "--tensor-parallel-size 2"),
        ("--dtype", "half", "--dtype float16"),
    ] {
        let args = ["m", flag, value];
        if cfg!(feature = "cuda") {
            assert_eq!(parse(&args).unwrap().validate(), Ok(()));
        } else {
            refused(&args, part);
        }
    }
    refused(
        &["m", "--device", "cpu", "--dtype", "half"],
        "--dtype float16",
    );
    for method in ["awq", "gptq", "compressed-tensors", "fp8"] {
        assert_eq!(parse(&["m", "-q", method]).unwrap().validate(), Ok(()));
    }
    for dtype in ["auto", "fp8", "fp8_e4m3"] {
        let args = parse(&["m", "--kv-cache-dtype", dtype]).unwrap();
        assert_eq!((args.validate(), args.validate_for_gpu()), (Ok(()), Ok(())));
    }
    refused(&["m", "--max-model-len", "0"], "--max-model-len");
    refused(
        &["m", "--gpu-memory-utilization", "1.2"],
        "--gpu-memory-utilization",
    );
    refused(
        &["m", "--gpu-memory-utilization", "nan"],
        "--gpu-memory-utilization",
    );
    refused(
        &[
            "m",
            "--max-num-seqs",
            "64",
            "--max-num-batched-tokens",
            "32",
        ],
        "--max-num-seqs 64",
    );
    assert_eq!(
        parse(&["m", "--max-model-len", "32k"]).unwrap().validate(),
        Ok(())
    );
}

#[test]
fn batch_invariance_is_asked_for_by_a_flag_and_allowed_on_every_device() {
    assert!(!parse(&["m"]).unwrap().batch_invariant);
    let args = parse(&["m", "--batch-invariant"]).unwrap();
    assert!(args.batch_invariant);
    for device in [Device::Auto, Device::Cpu] {
        let args = EngineArgs {
            device,
            ..args.clone()
        };
        assert_eq!(args.validate(), Ok(()));
    }
    assert_eq!(args.validate_for_gpu(), Ok(()));
    let ranks = parse(&["m", "--batch-invariant", "--tp", "2"]).unwrap();
    assert_eq!(ranks.validate_for_gpu(), Ok(()));
}
