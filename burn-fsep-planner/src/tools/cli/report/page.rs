use std::fmt::Write as _;

use super::figures;
use crate::tools::cli::{CliError, ReportArgs, files::write_whole, replay::Replays, summary::Summary};

/// Writes the page; returns what to print.
pub(crate) fn report(args: &ReportArgs) -> Result<String, CliError> {
    let replays = Replays::run(&args.trace)?;
    let page = page(&replays)?;
    write_whole(&args.output, page.as_bytes())?;
    Ok(format!("{}\n", args.output.display()))
}

fn page(replays: &Replays) -> Result<String, CliError> {
    let name = replays.path.file_name().unwrap_or_default().to_string_lossy();
    let title = format!("Expert load and layouts: {}", escape(&name));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>{title}</title>\n<style>{STYLE}</style>\
         </head>\n<body><h1>{title}</h1>\n<p>{}</p>\n",
        replays.setting()
    );
    page.push_str(&table(&replays.summaries()?));
    for (title, note, figure) in figures::all(replays)? {
        let _ = write!(page, "<h2>{title}</h2>\n<p>{note}</p>\n<figure>{figure}</figure>\n");
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}\
     h1{font-size:1.4em}h2{font-size:1.1em;margin:2em 0 0}p{margin:.3em 0;color:#444}\
     table{border-collapse:collapse;margin:1em 0;width:100%}td,th{padding:.2em .5em;text-align:right;border-bottom:1px solid #ddd}\
     td:first-child,th:first-child{text-align:left}figure{margin:.5em 0}svg{width:100%;height:auto}";

fn table(summaries: &[Summary]) -> String {
    let row = |tag: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = row("th", &Summary::COLUMNS.map(String::from));
    let rows: String = summaries.iter().map(|summary| row("td", &summary.cells())).collect();
    format!("<table>\n{head}{rows}</table>\n<p>{}.</p>\n", Summary::LEGEND)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_not_markup() {
        assert_eq!(escape("<b>&.csv"), "&lt;b&gt;&amp;.csv");
    }
}
