//! What a model says, in whatever pieces it comes: `FORMAT PIECES TEXT`, a byte each before the text.

use ashlar::output::{
    MessageEvent, MessageParser, Reasoning, ReasoningFormat, ToolCalls, ToolFormat,
};

fn parser(format: u8) -> MessageParser {
    let tools = match format % 6 {
        0 => Some(ToolFormat::Hermes),
        1 => Some(ToolFormat::Llama3Json),
        2 => Some(ToolFormat::Mistral),
        3 => Some(ToolFormat::Array),
        4 => Some(ToolFormat::Named("f".to_owned())),
        _ => None,
    };
    let reasoning = match format / 6 % 4 {
        0 => Some(Reasoning::new(ReasoningFormat::Think, false)),
        1 => Some(Reasoning::new(ReasoningFormat::Think, true)),
        2 => Some(Reasoning::new(ReasoningFormat::Magistral, false)),
        _ => None,
    };
    MessageParser::new(reasoning, tools.map(ToolCalls::new))
}

fn events<'a>(format: u8, pieces: impl Iterator<Item = &'a str>) -> Vec<MessageEvent> {
    let mut parser = parser(format);
    let mut events = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut events);
    }
    parser.finish(&mut events);
    events
}

/// The same events however the text is cut.
pub(crate) fn run(data: &[u8]) {
    let [format, size, text @ ..] = data else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let whole = events(*format, std::iter::once(text.as_ref()));
    let size = usize::from(size % 16) + 1;
    let mut cuts: Vec<usize> = (0..text.len())
        .step_by(size)
        .map(|at| text.floor_char_boundary(at))
        .collect();
    cuts.push(text.len());
    let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
    assert_eq!(whole, events(*format, pieces), "in pieces of {size}");
}
