use std::{
    convert::Infallible,
    io::{self, BufRead, BufReader, Read, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

/// Longest piece that is printed as one line.
const MAX_LINE: u64 = 64 << 10;

/// How long output may come after all ranks have ended: only a process that has left its rank's group holds it open for longer
/// than the last lines take on a busy machine.
const AFTERMATH: Duration = Duration::from_secs(5);

/// Passes on what the ranks print, with the rank before each line.
pub(super) struct Output {
    /// `None` once no further output will be added.
    open: Option<mpsc::Sender<Infallible>>,
    closed: mpsc::Receiver<Infallible>,
}

impl Output {
    pub fn new() -> Self {
        let (open, closed) = mpsc::channel();
        Self { open: Some(open), closed }
    }

    /// Starts to copy lines, until the rank closes its end.
    pub fn forward(
        &self,
        rank: usize,
        from: impl Read + Send + 'static,
        to: impl Write + Send + 'static,
    ) -> io::Result<()> {
        let open = self.open.clone();
        let run = move || {
            copy(rank, from, to);
            drop(open);
        };
        thread::Builder::new().name(format!("output-{rank}")).spawn(run).map(drop)
    }

    /// Waits until everything is printed.
    pub fn finish(&mut self) {
        self.open = None;
        let _ = self.closed.recv_timeout(AFTERMATH);
    }
}

fn copy(rank: usize, from: impl Read, mut to: impl Write) {
    let mut from = BufReader::new(from);
    let prefix = format!("[rank {rank}] ");
    let mut line = Vec::new();
    loop {
        line.clear();
        line.extend_from_slice(prefix.as_bytes());
        match from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // One write a line, so that those of several ranks do not mix. Read on if nobody listens: the rank must not block.
        let _ = to.write_all(&line).and_then(|()| to.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(input: &[u8]) -> String {
        let mut output = Vec::new();
        copy(3, input, &mut output);
        String::from_utf8_lossy(&output).into_owned()
    }

    #[test]
    fn every_line_names_its_rank() {
        assert_eq!(copied(b"a\n\nb"), "[rank 3] a\n[rank 3] \n[rank 3] b\n");
        assert_eq!(copied(b""), "");
    }

    #[test]
    fn a_line_without_end_takes_no_endless_memory() {
        let lines = copied(&vec![b'x'; 2 * MAX_LINE as usize]);
        assert_eq!(lines.lines().count(), 2);
    }
}
