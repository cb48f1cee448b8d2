//! The `ashlar` command: reads the arguments, runs one subcommand, says on one line why it failed.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves large language models: paged attention, continuous batching, OpenAI's API.
#[derive(Debug, Parser)]
#[command(name = "ashlar", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over HTTP with OpenAI's API.
    Serve(Box<commands::serve::ServeArgs>),
    /// Generate text for a file of prompts: JSON lines in, JSON lines out.
    Generate(Box<commands::generate::GenerateArgs>),
    /// Download a model, with resume and hash checks.
    Pull(Box<commands::pull::PullArgs>),
    /// Measure speed and concurrency.
    Bench(Box<commands::bench::BenchArgs>),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => commands::serve::run(*args),
        Command::Generate(args) => commands::generate::run(*args),
        Command::Pull(args) => commands::pull::run(*args),
        Command::Bench(args) => commands::bench::run(*args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ashlar: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
