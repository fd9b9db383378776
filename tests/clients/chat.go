// Ten streamed chats through an unmodified openai-go, whose first token comes later than a keep-alive comment.
package main

import (
	"context"
	"fmt"
	"os"

	openai "OPENAI_GO"
	"OPENAI_GO/option"
)

func chat(client openai.Client) (string, error) {
	stream := client.Chat.Completions.NewStreaming(context.Background(), openai.ChatCompletionNewParams{
		Model:     "gpt-4",
		Messages:  []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello")},
		MaxTokens: openai.Int(32000),
		Store:     openai.Bool(true),
	})
	text := ""
	for stream.Next() {
		for _, choice := range stream.Current().Choices {
			text += choice.Delta.Content
		}
	}
	return text, stream.Err()
}

func main() {
	client := openai.NewClient(option.WithBaseURL(os.Getenv("BASE_URL")), option.WithAPIKey("demo-key"))
	for number := 0; number < 10; number++ {
		text, err := chat(client)
		if err != nil || text == "" {
			fmt.Fprintf(os.Stderr, "request %d: %q, %v\n", number, text, err)
			os.Exit(1)
		}
	}
	fmt.Println(10)
}
