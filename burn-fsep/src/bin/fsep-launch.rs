//! Starts a program as several ranks on this machine: `fsep-launch --ranks 4 -- PROGRAM ARGS...`.

#[cfg(unix)]
fn main() -> std::process::ExitCode {
    use clap::Parser;

    match unix::Cli::parse().launcher().run() {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("fsep-launch: {error}");
            // As `env` and shells have it where a program cannot be started.
            127.into()
        }
    }
}

#[cfg(not(unix))]
fn main() -> std::process::ExitCode {
    eprintln!("fsep-launch needs a Unix system");
    std::process::ExitCode::FAILURE
}

#[cfg(unix)]
mod unix {
    use std::{ffi::OsString, time::Duration};

    use burn_fsep::launch::LauncherConfig;
    use clap::Parser;

    /// Starts a program as several ranks on this machine.
    ///
    /// Each rank gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and BURN_FSEP_TOKEN (a random
    /// one). The exit code is that of the first rank that fails.
    #[derive(Debug, Parser)]
    #[command(version)]
    pub struct Cli {
        /// How many ranks to start.
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        ranks: u16,
        /// Port at which rank 0 listens on 127.0.0.1; a free one by default.
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        master_port: Option<u16>,
        /// Seconds that the other ranks have to end by themselves when one has failed.
        #[arg(long, default_value_t = 35)]
        grace: u64,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        program: Vec<OsString>,
    }

    impl Cli {
        pub fn launcher(mut self) -> LauncherConfig {
            let args = self.program.split_off(1);
            LauncherConfig::new(self.ranks.into(), self.program.remove(0))
                .with_args(args)
                .with_master_port(self.master_port)
                .with_grace(Duration::from_secs(self.grace))
        }
    }
}
