//! Chat templates render as Jinja2 renders them.

use std::fs;
use std::path::Path;

use helix_text::{Chat, Message, TemplateError, TextModel};
use serde_json::Value;

use crate::checkpoint::Checkpoint;

const SPECIAL: &str = r#"{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}"#;

fn model(template: &str) -> TextModel {
    let folder = Checkpoint::small().with("tokenizer_config.json", SPECIAL);
    folder.with("chat_template.jinja", template).load().unwrap()
}

fn user(content: &str) -> Message<'_> {
    Message {
        role: "user",
        content,
        name: None,
        ..Message::default()
    }
}

fn render(template: &str, content: &str) -> Result<String, TemplateError> {
    model(template).render_chat(&Chat::new(&[user(content)], true))
}

/// The line with the date changes every day.
fn undated(text: &str) -> String {
    text.lines()
        .filter(|line| !line.starts_with("Today is "))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn templates_render_as_jinja2_renders_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/templates");
    let truth: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("rendered.json")).unwrap()).unwrap();
    let cases = truth["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 12);
    let mut forgotten = 0;
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let model = model(&fs::read_to_string(folder.join(name)).unwrap());
        let messages: Vec<Message<'_>> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message {
                role: message["role"].as_str().unwrap(),
                content: message["content"].as_str().unwrap(),
                name: message["name"].as_str(),
                ..Message::default()
            })
            .collect();
        match (
            model.render_chat(&Chat::new(&messages, true)),
            case["rendered"].as_str(),
        ) {
            (Ok(found), Some(expected)) => assert_eq!(undated(&found), undated(expected), "{name}"),
            (Err(TemplateError::Refused(reason)), None) => {
                assert_eq!(reason, case["refused"], "{name}");
            }
            // What a template forgets without a word is refused here.
            (Err(TemplateError::NoTools(index)), Some(_)) => {
                assert_eq!(messages[index].role, "tool", "{name}");
                forgotten += 1;
            }
            (found, expected) => panic!("{name}: {found:?} instead of {expected:?}"),
        }
    }
    assert!(forgotten < cases.len() / 3, "{forgotten}");
}

#[test]
fn dates_are_of_today() {
    let date = render("{{ strftime_now('%Y-%m-%d') }}", "").unwrap();
    let parts: Vec<u32> = date.split('-').map(|part| part.parse().unwrap()).collect();
    assert!(
        parts[0] >= 2025 && (1..=12).contains(&parts[1]) && (1..=31).contains(&parts[2]),
        "{date}"
    );
}

#[test]
fn a_refusal_carries_the_words_of_the_template() {
    let template = "{% macro check(m) %}{% if 'bad' in m.content %}{{ raise_exception('No <bad> & \"words\"') }}{% endif %}{% endmacro %}\
                    {% for m in messages %}{{ check(m) }}{{ m.content }}{% endfor %}";
    assert_eq!(render(template, "good").unwrap(), "good");
    let error = render(template, "bad").unwrap_err();
    assert_eq!(error, TemplateError::Refused("No <bad> & \"words\"".into()));
    assert!(error.is_client_fault());
    assert!(error.to_string().ends_with("No <bad> & \"words\""));
}

#[test]
fn faults_of_the_template_name_the_line() {
    for (template, line) in [
        ("a\n{{ messages | nofilter }}", 2),
        ("{{ messages[0].no.thing }}", 1),
        ("\n\n{{ nofunction() }}", 3),
    ] {
        let error = render(template, "x").unwrap_err();
        assert!(
            matches!(error, TemplateError::Failed(_)) && !error.is_client_fault(),
            "{error:?}"
        );
        assert!(
            error.to_string().contains(&format!("line {line}: ")),
            "{error}"
        );
    }
}

#[test]
fn a_template_cannot_hang_or_fill_the_memory() {
    for template in [
        "{% for a in range(90000) %}{% for b in range(90000) %}{{ a }}{% endfor %}{% endfor %}",
        "{% set n = namespace(t='x') %}{% for a in range(90000) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{% macro f() %}{% for a in range(9999) %}{{ a }}{% endfor %}{% endmacro %}{% for a in range(99999) %}{{ f() }}{% endfor %}",
    ] {
        let error = render(template, "x").unwrap_err();
        assert_eq!(error, TemplateError::TooMuchWork, "{template}");
    }
    let recursive = render(
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "x",
    )
    .unwrap_err();
    assert!(
        matches!(recursive, TemplateError::Failed(_)),
        "{recursive:?}"
    );
}

#[test]
fn long_chats_stay_within_the_work_limit() {
    let template = include_str!("templates/thinking_style.jinja");
    let text = "word ".repeat(2_000);
    let messages: Vec<Message<'_>> = (0..2_000)
        .map(|at| Message {
            role: if at % 2 == 0 { "user" } else { "assistant" },
            content: &text,
            name: None,
            ..Message::default()
        })
        .collect();
    let prompt = model(template)
        .render_chat(&Chat::new(&messages, true))
        .unwrap();
    assert!(prompt.len() > 20_000_000);
}

#[test]
fn developer_is_system_unless_the_template_knows_it() {
    let message = Message {
        role: "developer",
        content: "x",
        name: None,
        ..Message::default()
    };
    let old = model("{% for m in messages %}{{ m.role }}{% endfor %}");
    assert_eq!(
        old.render_chat(&Chat::new(&[message], false)).unwrap(),
        "system"
    );
    let new = model(
        "{% for m in messages %}{{ m.role }}{% if m.role == 'developer' %}!{% endif %}{% endfor %}",
    );
    assert_eq!(
        new.render_chat(&Chat::new(&[message], false)).unwrap(),
        "developer!"
    );
}

#[test]
fn messages_are_data_not_template() {
    let tricky = "{{ raise_exception('x') }}{% for %} <&>";
    assert_eq!(
        render("{{ messages[0]['content'] }}", tricky).unwrap(),
        tricky
    );
}

#[test]
fn names_and_the_generation_prompt_reach_the_template() {
    let model = model(
        "{{ messages[0].name }}{% if add_generation_prompt %}+{% endif %}{% generation %}!{% endgeneration %}",
    );
    let message = Message {
        role: "user",
        content: "",
        name: Some("Zoë"),
        ..Message::default()
    };
    assert_eq!(
        model.render_chat(&Chat::new(&[message], true)).unwrap(),
        "Zoë+!"
    );
    assert_eq!(
        model.render_chat(&Chat::new(&[user("")], false)).unwrap(),
        "!"
    );
    assert_eq!(
        model.render_chat(&Chat::new(&[user("")], true)).unwrap(),
        "+!"
    );
}

#[test]
fn a_template_without_bos_gets_none() {
    let model = model("{{ messages[0].content }}");
    assert_eq!(
        model
            .encode_chat(&Chat::new(&[user("hello world")], true))
            .unwrap(),
        [3, 4]
    );
}
